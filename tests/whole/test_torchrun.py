"""`torchrun ... -m sana_cli train`, as a user runs it."""

import signal
import subprocess
import sys
from pathlib import Path

from helpers import start_sana, wait_until

from sana_cli.config.keys import Config
from sana_cli.training import metrics
from sana_cli.weights import checkpoint
from sana_cli.weights.reader import read_weights

TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "sana_cli",
)


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return start_sana(folder, "train", "--config", "small.yaml", *arguments, launcher=TORCHRUN)


def test_torchrun_prints_once_and_saves_when_it_is_stopped(config: Config, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(config.to_yaml())
    done = torchrun(tmp_path)
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert out == f"{config.run.dir}/checkpoints/step-000004\n"
    assert (
        err.count("parameters") == err.count("step 4: checkpoint") == err.count("trained steps 1 to 4") == 1
    )
    assert "4 processes" not in err

    long = (
        "--set",
        f"run.dir={tmp_path / 'long'}",
        "--set",
        "train.steps=100000",
        "--set",
        "save.every=100000",
    )
    running = torchrun(tmp_path, *long)
    lines = tmp_path / "long" / metrics.METRICS
    wait_until(lambda: lines.is_file() and len(metrics.read(lines)) > 3, running, seconds=60)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    assert err.count("error: stopped after step") == 1
    folder, skipped = checkpoint.newest_step(tmp_path / "long", hashes=True)
    assert folder is not None
    assert skipped == []
    assert checkpoint.step_of(folder) >= 4
    assert read_weights(folder / "transformer").tensors
