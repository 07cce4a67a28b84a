"""Embed, train, sample and inspect as a user does: processes, stdout and stderr, no network."""

import json
import os
from pathlib import Path

from helpers import Sana


def test_the_main_job_offline(sana: Sana, small: Path, tmp_path: Path) -> None:
    embedded = sana("embed", "--config", "small.yaml", "--limit", "50")
    assert embedded.returncode == 0, embedded.stderr
    assert "21 distinct" in embedded.stdout
    assert "nothing to do" in sana("embed", "--config", "small.yaml", "--limit", "50").stderr

    trained = sana("train", "--config", "small.yaml")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout == "runs/small/checkpoints/step-000004\n"
    assert "train 4/4  loss " in trained.stderr
    assert "\x1b" not in trained.stderr + trained.stdout
    refused = sana("train", "--config", "small.yaml")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "error: runs/small has checkpoints already" in refused.stderr
    resumed = sana("train", "--config", "small.yaml", "--resume", "auto")
    assert (resumed.returncode, "is finished at step 4; nothing to do" in resumed.stderr) == (0, True)

    drawn = sana("sample", "4 two 4 six", "--steps", "2")
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout == "runs/small/sample-step-000004.png\n"
    described = json.loads(sana("inspect", "runs/small/sample-step-000004.png", "--json").stdout)
    assert [row["prompt"] for row in described["table"]] == ["4", "two", "4", "six"]

    run = json.loads(sana("inspect", "runs/small", "--verify", "--json").stdout)
    assert (run["kind"], run["step"], type(run["parameters"])) == ("run", 4, int)
    assert "error" not in sana("inspect", "data/quickstart", "--verify").stderr
    again = sana("inspect", "runs/small", "--yaml").stdout
    (tmp_path / "again.yaml").write_text(again)
    planned = json.loads(
        sana("train", "--config", "again.yaml", "--resume", "auto", "--dry-run", "--json").stdout
    )
    assert (planned["parameters"], planned["steps"], planned["batch"]) == (run["parameters"], 4, 4)


def test_a_random_gemma_2_goes_all_the_way(sana: Sana, small: Path, gemma: Path, tmp_path: Path) -> None:
    encoder = ("--config", "small.yaml", "--set", f"text.encoder={gemma}")
    assert sana("embed", *encoder, "--limit", "30").returncode == 0
    trained = sana("train", *encoder, "--set", "train.steps=2", "--set", 'sample.prompts=["4 eleven"]')
    assert trained.returncode == 0, trained.stderr
    drawn = sana("sample", "4 two", "--checkpoint", "runs/small")
    assert drawn.returncode == 0, drawn.stderr
    step = tmp_path / "runs" / "small" / "checkpoints" / "step-000002"
    moved = step.rename(tmp_path / "elsewhere")
    lost = sana("sample", "4", "--checkpoint", "elsewhere")
    assert lost.returncode == 1
    assert "--encoder PATH says where that lies" in lost.stderr
    assert sana("sample", "4", "--checkpoint", "elsewhere", "--encoder", str(gemma)).returncode == 0
    assert json.loads((moved / "sana.json").read_text())["encoder"]["encoder"] == gemma.name


def test_read_only_run_directory(sana: Sana, small: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        (tmp_path / "runs").write_text("a file where the folder should be")
    else:
        (tmp_path / "runs").mkdir(mode=0o500)
    assert sana("embed", "--config", "small.yaml", "--limit", "50").returncode == 0
    answer = sana("train", "--config", "small.yaml")
    assert answer.returncode == 1
    assert "error: writing runs/small" in answer.stderr
    assert "Traceback" not in answer.stderr
