"""The command line as a user meets it: processes, exit codes, stdout and stderr, no network, no torch for --help."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, process_environment
from safetensors.torch import load_file

from sana_cli.weights import checkpoint

Sana = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A config file for runs of seconds, in the working directory of `sana`."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    return path


@pytest.mark.parametrize("command", [(), ("embed",), ("train",), ("sample",), ("inspect",), ("eval",)])
def test_help_needs_no_torch(command: tuple[str, ...], tmp_path: Path) -> None:
    script = (
        "import sys\nfrom sana_cli.cli import app\n"
        f"try: app([*{command!r}, '--help'])\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'transformers', 'numpy', 'PIL', 'rich'} & set(sys.modules), 'heavy imports'"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], env=process_environment(tmp_path), capture_output=True, text=True, check=True, timeout=60
    )
    assert "Usage" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80


def test_the_main_job_offline(sana: Sana, small: Path, tmp_path: Path) -> None:
    embedded = sana("embed", "--config", "small.yaml", "--limit", "50")
    assert embedded.returncode == 0, embedded.stderr
    assert "21 distinct" in embedded.stdout
    assert "the lesson's layout would take 138.2 MB" in embedded.stdout
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
    told = json.loads(sana("inspect", "runs/small/sample-step-000004.png", "--json").stdout)
    assert [row["prompt"] for row in told["table"]] == ["4", "two", "4", "six"]

    run = json.loads(sana("inspect", "runs/small", "--verify", "--json").stdout)
    assert (run["kind"], run["step"], type(run["parameters"])) == ("run", 4, int)
    assert "error" not in sana("inspect", "data/quickstart", "--verify").stderr
    again = sana("inspect", "runs/small", "--yaml").stdout
    (tmp_path / "again.yaml").write_text(again)
    planned = json.loads(sana("train", "--config", "again.yaml", "--dry-run", "--json").stdout)
    assert (planned["parameters"], planned["steps"], planned["batch"]) == (run["parameters"], 4, 4)


def test_inspect_alone_lists_the_shipped_configs(sana: Sana) -> None:
    table = sana("inspect").stdout
    assert "220,191,040" in table
    assert "29,948,224" in table
    document = json.loads(sana("inspect", "--json").stdout)
    assert {row["config"]: row["parameters"] for row in document["configs"]}["sana"] == 220_191_040
    assert "220,191,040" in sana("inspect", str(REPOSITORY / "configs" / "sana.yaml")).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "--config", "bad.yaml"), 2, "error: bad.yaml:1: unknown key train.lrr; did you mean train.lr?"),
        (("embed", "--config", "bad.yaml"), 2, "error: bad.yaml:1: unknown key train.lrr; did you mean train.lr?"),
        (("inspect", "bad.yaml"), 2, "error: bad.yaml:1: unknown key train.lrr; did you mean train.lr?"),
        (("train", "--config", "quikstart"), 2, "error: no config 'quikstart'; did you mean quickstart?"),
        (("train",), 1, "error: no dataset in data/quickstart"),
        (("sample", "4", "--checkpoint", "runs"), 1, "error: no checkpoint in runs: it has neither checkpoints/ nor"),
        (("eval",), 1, "error: no dataset in data/quickstart: the judge learns from its images and labels"),
        (("embed", "--set", "text.encoder=./gemma"), 1, "error: text.encoder: no folder ./gemma"),
        (
            ("embed", "--set", "text.encoder=google/gemma-2-2b-it"),
            1,
            "error: text.encoder: google/gemma-2-2b-it is not in the local cache",
        ),
        (("inspect", "no/such.yaml"), 2, "error: no/such.yaml does not exist"),
        (("train", "--set", "run.device=cuda"), 1, "error: no dataset"),
        (("trian",), 2, "Did you mean"),
        (("embed", "--limit", "0"), 2, "Invalid value"),
    ],
)
def test_mistakes_are_one_message(sana: Sana, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    (tmp_path / "bad.yaml").write_text("train: {lrr: 1}")
    (tmp_path / "runs").mkdir()
    answer = sana(*arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert (answer.returncode, answer.stdout) == (code, "")
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_version_and_module(sana: Sana) -> None:
    from sana_cli import __version__

    assert sana("--version").stdout == f"sana {__version__}\n"


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


# --- signals and kills ------------------------------------------------------------------------------------------------


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sana_cli", *arguments],
        cwd=tmp_path,
        env=process_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def test_sigkill_in_the_middle_of_a_save_leaves_the_earlier_checkpoint(sana: Sana, small: Path, tmp_path: Path) -> None:
    assert sana("embed", "--config", "small.yaml", "--limit", "50").returncode == 0
    run, long = tmp_path / "runs" / "small", ("--set", "train.steps=100000", "--set", "train.save_every=1")
    inside = 0
    for attempt in range(4):
        process = start(tmp_path, "train", "--config", "small.yaml", *long, "--resume", "auto")
        before = checkpoint.newest_step(run)[0]
        name = before.name if before else ""
        wait_for(lambda name=name: any(s.name > name and (s / "manifest.json").exists() for s in checkpoint.steps(run)), process)
        files = ("training/raw.safetensors", "transformer/config.json", "training/state.json", "sana.json")
        wait_for(lambda file=files[attempt]: any(run.glob(f"checkpoints.partial/step-*/{file}")), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        inside += any(run.glob("checkpoints.partial/step-*"))
        folder, skipped = checkpoint.newest_step(run, hashes=True)
        assert folder is not None
        assert skipped == []
        assert load_file(folder / "training" / "raw.safetensors")
    assert inside >= 2, "the kills were to hit a save"
    resumed = sana(
        "train", "--config", "small.yaml", "--set", f"train.steps={checkpoint.step_of(folder) + 2}", "--resume", "auto"
    )
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_the_last_whole_step(sana: Sana, small: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    assert sana("embed", "--config", "small.yaml", "--limit", "50").returncode == 0
    long = ("--set", "train.steps=100000", "--set", "train.save_every=100000")
    process = start(tmp_path, "train", "--config", "small.yaml", *long)
    metrics = tmp_path / "runs" / "small" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3, process)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == code, told
    folder = checkpoint.steps(tmp_path / "runs" / "small")[-1]
    assert f"stopped after step {checkpoint.step_of(folder)}, which is saved" in told
    assert list(checkpoint.verify(folder, hashes=True))


def test_sigterm_ends_embedding_and_leaves_no_dataset(small: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "embed", "--config", "small.yaml")
    wait_for(lambda: (tmp_path / "data" / "quickstart.partial" / "captions-00000.safetensors").exists(), process)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=60)[1]
    assert (process.returncode, "error: terminated" in told) == (143, True)
    assert not (tmp_path / "data" / "quickstart").exists()


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


WINGS = (  # each may import those before it, and its own modules
    {"errors", "units", "choices"},
    {"runtime"},
    {"config"},
    {"flow", "model"},
    {"sources", "text", "autoencoder"},
    {"dataset"},
    {"weights"},
    {"sampling"},
    {"training", "judging"},
    {"commands", "console", "interrupts"},
    {"cli"},
    {"__main__"},
)


def test_the_tree_imports_downwards() -> None:
    """And commands do not import each other: what two of them need lies one floor down."""
    level = {name: number for number, names in enumerate(WINGS) for name in names}
    package = REPOSITORY / "sana_cli"
    for path in package.rglob("*.py"):
        wing = path.relative_to(package).parts[0].removesuffix(".py")
        if wing == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("sana_cli"):
                continue
            parts = (node.module or "").split(".")[1:]
            for target in [parts[0]] if parts else [a.name for a in node.names if a.name != "__version__"]:
                inside = target == wing != "commands"
                assert inside or level[target] < level[wing], f"{path.relative_to(package)} imports {target}"
