"""What systems lack or set: semaphores, modules, job variables, disk space, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import SMALL, Sana, invoke, process_environment, small_config
from PIL import Image

from sana_cli.commands.embed import EmbedOptions, EmbedSummary, embed
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.runtime.launch import Launch, read_launch
from sana_cli.sources import windows
from sana_cli.weights import checkpoint

# --- workers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lacking",
    [
        OSError(38, "Function not implemented"),
        ImportError("This platform lacks a functioning sem_open implementation"),
        NotImplementedError("system provides too few semaphores"),
        PermissionError(13, "Permission denied"),
    ],
)
def test_without_semaphores_one_process_decodes(
    lacking: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise lacking

    (tmp_path / "a" / "red").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16), "red").save(tmp_path / "a" / "red" / f"{number}.png")
    source = ("data.source=folder", f"data.path={tmp_path / 'a'}", "model.in_channels=3")
    plain = small_config(tmp_path / "plain", *source, "data.workers=0")
    crippled = small_config(tmp_path / "crippled", *source, "data.workers=2")
    *_, expected = embed(EmbedOptions(plain))
    monkeypatch.setattr(windows, "ProcessPoolExecutor", refuse)
    *_, summary = embed(EmbedOptions(crippled))
    assert isinstance(summary, EmbedSummary)
    assert isinstance(expected, EmbedSummary)
    assert "one process" in summary.notes[0]
    assert "data.workers=0" in summary.notes[0]
    assert not expected.notes
    one, other = (Dataset(config.data.dir).index.images for config in (plain, crippled))
    assert one == other, "the same bytes"


# --- Windows ------------------------------------------------------------------------------------------------

BARE = """
import signal, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGUSR1"):
    delattr(signal, name)
"""


def test_one_process_works_without_what_windows_lacks(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BARE)
    (tmp_path / "small.yaml").write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    for command in (
        ("embed", "--config", "small.yaml", "--limit", "30"),
        ("train", "--config", "small.yaml", "--set", "train.steps=2"),
        ("sample", "4"),
        ("inspect", "runs/small", "--verify"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "sana_cli", *command],
            cwd=tmp_path, env=process_environment(tmp_path), capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert len(checkpoint.steps(tmp_path / "runs" / "small")) == 1


# --- variables of job systems -------------------------------------------------------------------------------

FULL = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "1", "LOCAL_RANK": "1"}


def test_a_launch_is_a_full_set_of_variables_or_torchruns() -> None:
    assert read_launch({}) == Launch()
    assert read_launch(FULL) == Launch(1, 4, 1)
    assert read_launch(
        {"TORCHELASTIC_RUN_ID": "none", "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    ) == Launch(2, 3, 0, True)
    for missing in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        some = {name: value for name, value in FULL.items() if name != missing}
        assert read_launch(some) == Launch(), missing
    for wrong, message in (
        ({"RANK": "one"}, "RANK is 'one' in the environment, not a number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment"),
        ({"RANK": "4"}, "RANK is 4 and WORLD_SIZE 4 in the environment"),
    ):
        with pytest.raises(SanaError, match=message):
            read_launch(FULL | wrong)


@pytest.mark.parametrize("variables", [{"RANK": "1", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}, FULL], ids=str)
def test_commands_of_one_process_answer_whatever_is_set(
    variables: dict[str, str], sana: Sana, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = sana("sample", "4", "--steps", "1", "--out", "p.png", **variables)
    assert drawn.stdout == "p.png\n", drawn.stderr
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert invoke("--version").stdout.startswith("sana ")
    assert invoke("inspect", "quickstart").stdout.startswith("config ")
    wrong = invoke("sample", "4", "--checkpoint", "nothing")
    assert (wrong.exit_code, wrong.stderr.startswith("error: no checkpoint at nothing")) == (1, True)


def test_embed_and_train_take_half_a_launch_for_none(
    sana: Sana, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.yaml").write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    half = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    made = sana("embed", "--config", "small.yaml", "--limit", "30", **half)
    assert "images" in made.stdout, made.stderr
    trained = sana("train", "--config", "small.yaml", "--set", "train.steps=2", **half)
    assert trained.stdout == "runs/small/checkpoints/step-000002\n", trained.stderr
    monkeypatch.chdir(tmp_path)
    for name, value in (FULL | {"RANK": "x"}).items():
        monkeypatch.setenv(name, value)
    wrong = invoke("train", "--config", "small.yaml")
    assert (wrong.exit_code, wrong.stderr) == (
        1, "error: RANK is 'x' in the environment, not a number\nunset RANK, or start with torchrun\n"
    )  # fmt: skip


# --- full disks ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "command",
    [
        ("inspect",), ("inspect", "--json"), ("inspect", "quickstart"), ("inspect", "quickstart", "--yaml"),
        ("inspect", "--schema"), ("inspect", "--env"), ("--version",), ("--help",), ("sample", "--help"),
        ("sample", "4", "-q", "--steps", "1", "--out", "p.png"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_result_that_cannot_be_written_is_one_message(command: tuple[str, ...], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sana_cli", *command],
            cwd=tmp_path, env=process_environment(tmp_path), stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=300, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        [
            "error: what was found could not be written to stdout: No space left on device",
            "send it to a place that has room",
        ],
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_does_not_stop_the_work(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    for command in (("embed", "--limit", "30"), ("train",)):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "sana_cli", *command, "--config", "small.yaml"],
                cwd=tmp_path, env=process_environment(tmp_path), stdout=subprocess.PIPE, stderr=full,
                timeout=300, check=False,
            )  # fmt: skip
        assert done.returncode == 0
    assert [step.name for step in checkpoint.steps(tmp_path / "runs" / "small")] == [
        "step-000002",
        "step-000004",
    ]


def test_letters_that_an_encoding_lacks_are_spelt_out(sana: Sana, tmp_path: Path) -> None:
    done = sana(
        "sample", "4", "--steps", "1", "--out", "vier-é.png", PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    assert (done.returncode, done.stdout) == (0, "vier-\\xe9.png\n"), done.stderr
    assert (tmp_path / "vier-é.png").exists()


# --- schedulers ---------------------------------------------------------------------------------------------


def test_slurms_warning_saves_and_ends(sana: Sana, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    assert sana("embed", "--config", "small.yaml", "--limit", "50").returncode == 0
    long = ("--set", "train.steps=100000", "--set", "save.every=100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "sana_cli", "train", "--config", "small.yaml", *long],
        cwd=tmp_path, env=process_environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    metrics, deadline = tmp_path / "runs" / "small" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGUSR1, stderr
    folder = checkpoint.steps(tmp_path / "runs" / "small")[-1]
    assert f"stopped after step {checkpoint.step_of(folder)}, which is saved" in stderr
    assert list(checkpoint.verify(folder, hashes=True))
    assert json.loads((folder / checkpoint.STATE).read_text())["step"] == checkpoint.step_of(folder)


def test_resume_names_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL + "run: {dir: runs/small, device: cpu}\n")
    assert invoke("embed", "--config", "small.yaml", "--limit", "30").exit_code == 0
    wrong = invoke("train", "--config", "small.yaml", "--resume", "latest")
    assert (wrong.exit_code, wrong.stderr) == (
        2, "error: --resume: 'latest' is no checkpoint\nthe newest of the run is --resume auto\n"
    )  # fmt: skip
    assert invoke("train", "--config", "small.yaml", "--set", "train.steps=2").exit_code == 0
    shutil.copytree(tmp_path / "runs" / "small" / "checkpoints" / "step-000002", tmp_path / "latest")
    gone_on = invoke("train", "--config", "small.yaml", "--resume", "latest", "--set", "run.dir=runs/more")
    assert gone_on.exit_code == 0, gone_on.stderr  # a folder with that name is a checkpoint


def test_home_is_home_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    (home / "small.yaml").write_text(SMALL + "run: {dir: ~/runs/small, device: cpu}\n")
    places = ("--config=~/small.yaml", "--set", "data.dir=~/data")
    assert invoke("embed", *places, "--limit", "30").exit_code == 0
    trained = invoke("train", *places, "--set", "train.steps=2")
    assert trained.stdout == f"{home}/runs/small/checkpoints/step-000002\n", trained.stderr
    (home / "prompts.txt").write_text("4\n")
    options = (
        "--checkpoint=~/runs/small",
        "--prompts-file=~/prompts.txt",
        "--out=~/pictures/",
        "--trajectory=~/film.gif",
    )
    drawn = invoke("sample", *options)
    assert drawn.exit_code == 0, drawn.stderr
    assert (home / "pictures" / "sample-step-000002.png").is_file()
    assert (home / "film.gif").is_file()
    assert "run " in invoke("inspect", "~/runs/small").stdout
    assert invoke("embed", *places, "--out=~/other", "--limit", "30").exit_code == 0
    assert (home / "other" / "index.json").is_file()
    assert not [path for path in tmp_path.rglob("*") if path.name == "~"]


def test_prompts_come_from_stdin_and_comments_are_none(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sana_cli", "sample", "--prompts-file", "-", "--steps", "1", "--out", "p.png",
        "--json"],
        cwd=tmp_path, env=process_environment(tmp_path),
        input="\ufeff# my prompts\r\n4 two\r\n  # more\r\nsix\u2028x\r\n",
        capture_output=True, text=True, timeout=300, check=False, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert [image["prompt"] for image in record["images"]] == ["4", "two", "six", "x"]
    assert record["notes"] == ["words that this checkpoint was never trained on: x"]


def test_tools_that_job_systems_wrap_see_no_variables_of_ours() -> None:
    """Importing the package changes no environment variable; only the command line does."""
    before = dict(os.environ)
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; b = dict(os.environ); import sana_cli.weights.checkpoint; assert dict(os.environ) == b",
        ],
        check=True,
    )
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    "command", ["--version", "inspect --json", "inspect --schema", "sample 4 --steps 1 --out p.png"]
)
def test_closed_streams_do_no_harm(command: str, tmp_path: Path) -> None:
    """As under some daemons: if stdin, stdout or stderr is closed, no file takes its place."""
    line = f"exec {sys.executable} -m sana_cli {command} <&- >&- 2>&-"
    done = subprocess.run(
        ["sh", "-c", line], cwd=tmp_path, env=process_environment(tmp_path), timeout=300, check=False
    )
    assert done.returncode == 0
    if "sample" in command:
        with Image.open(tmp_path / "p.png") as image:
            image.load()


def test_prompts_from_a_closed_stdin_are_none(tmp_path: Path) -> None:
    line = f"exec {sys.executable} -m sana_cli sample --prompts-file - <&-"
    done = subprocess.run(
        ["sh", "-c", line],
        cwd=tmp_path,
        env=process_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, "error: nothing to draw" in done.stderr) == (2, True)


def test_names_that_no_file_system_takes_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = "a" * 300
    for command in (
        ("sample", "4", "--out", f"{long}.png"), ("sample", "4", "--checkpoint", long), ("train", "--config",
        long),
        ("inspect", long), ("sample", "4", "--separate", long),
    ):  # fmt: skip
        done = invoke(*command, "--steps", "1") if command[0] == "sample" else invoke(*command)
        assert done.exit_code in (1, 2)
        assert isinstance(done.exception, SystemExit), "a message, and no traceback"
        assert "error: " in done.stderr
