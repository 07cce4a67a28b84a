"""Real processes stopped by real signals at every stage of a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    PYTHON_SANA,
    Sana,
    again,
    assert_same_tensors,
    checkpoint_tensors,
    child,
    contents,
    embedded,
    process_environment,
    start_sana,
    trained,
    wait_until,
)

from sana_cli import cli, flow, interrupts
from sana_cli.config.keys import Config
from sana_cli.runtime import files
from sana_cli.training import metrics, trainer
from sana_cli.training.objective import RectifiedFlow
from sana_cli.weights import checkpoint

WAIT = 10.0  # maximum seconds for a stop


def sana_train(config: Config) -> None:
    """Run `sana train --resume auto` in this process."""
    path = config.run.dir.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    cli.app(["train", "--config", str(path), "--resume", "auto"], prog_name="sana")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("during", ["step", "sampling", "saving", "held-out loss"])
def test_a_signal_saves_the_last_whole_step(
    config: Config, monkeypatch: pytest.MonkeyPatch, during: str, number: signal.Signals, code: int
) -> None:
    def cut(*overrides: str) -> Config:
        common = ("optim.schedule=constant", "save.every=1000", "log.sample_every=1000")
        return again(config, *common, "train.batch_size=2", "train.accumulate=2", *overrides)

    first = trained(cut("train.steps=5"))
    untouched, mark = checkpoint_tensors(first.checkpoint), config.run.dir.parent / "mark"

    def slow(place: Any, name: str) -> None:
        honest = getattr(place, name)

        def slowed(*arguments: Any, **more: Any) -> Any:
            mark.touch()
            time.sleep(0.2)
            return honest(*arguments, **more)

        monkeypatch.setattr(place, name, slowed)

    overrides = ["train.steps=100000"]
    if during == "step":  # the first micro-batch of two
        slow(RectifiedFlow, "losses")
    elif during == "sampling":  # a grid would take hours
        overrides += ["log.sample_every=7", "sample.steps=1000000"]
        slow(flow, "guide")
    elif during == "saving":
        overrides += ["save.every=7"]
        slow(files, "write_tensors")
    else:
        overrides += ["data.held_out_split=test", "log.held_out_every=7", "log.held_out_images=100000"]
        embedded(cut(*overrides))
        slow(trainer, "held_out_batch")
    process = child(lambda: sana_train(cut(*overrides)))
    wait_until(mark.exists, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(WAIT)
    assert process.exitcode == code
    newest, skipped = checkpoint.newest_step(config.run.dir, hashes=True)
    assert newest is not None
    assert skipped == []
    assert checkpoint.step_of(newest) == (5 if during == "step" else 7)
    assert_same_tensors(checkpoint_tensors(first.checkpoint), untouched)


def test_a_second_signal_leaves_at_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = config.run.dir.parent / "mark"

    def stuck(*_: object, **__: object) -> None:
        mark.touch()
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(RectifiedFlow, "losses", stuck)
    process = child(lambda: sana_train(config))
    wait_until(mark.exists, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(0.5)
    assert process.is_alive()  # it would finish its micro-batch first
    os.kill(process.pid, signal.SIGINT)
    process.join(WAIT)
    assert process.exitcode == 130


@pytest.mark.parametrize("after", [0.1, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0])
def test_a_signal_during_start_up_leaves_everything_as_it_was(
    config: Config, tmp_path: Path, after: float
) -> None:
    (tmp_path / "small.yaml").write_text(config.to_yaml())
    trained(again(config, "train.steps=2"))
    before = contents(config.run.dir / "checkpoints")
    process = start_sana(
        tmp_path, "train", "--config", "small.yaml", "--resume", "auto", "--set", "train.steps=100000"
    )
    time.sleep(after)
    process.send_signal(signal.SIGTERM)
    try:
        _, err = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    if process.returncode != 143:  # on a busy machine, Python had not started yet
        assert (after, process.returncode, err) == (0.1, -signal.SIGTERM, "")
    assert "Traceback" not in err
    now = contents(config.run.dir / "checkpoints")
    assert all(now[name] == content for name, content in before.items() if name in now)
    folder, skipped = checkpoint.newest_step(config.run.dir, hashes=True)
    assert folder is not None
    assert skipped == []
    assert checkpoint.step_of(folder) >= 2


def test_a_lost_terminal_is_no_concern_under_nohup(config: Config, tmp_path: Path) -> None:
    long = again(config, "train.steps=400", "save.every=400", "log.sample_every=400")
    (tmp_path / "small.yaml").write_text(long.to_yaml())
    log, lines = tmp_path / "log", config.run.dir / metrics.METRICS
    with log.open("w") as file:
        process = subprocess.Popen(
            ["nohup", *PYTHON_SANA, "train", "--config", "small.yaml"],
            cwd=tmp_path, env=process_environment(tmp_path), stdin=subprocess.DEVNULL, stdout=file,
            stderr=file,
        )  # fmt: skip
    wait_until(lambda: lines.is_file() and len(metrics.read(lines)) >= 2, seconds=60)
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    output = log.read_text()
    assert "train 400/400  loss " in output
    assert "\x1b" not in output
    assert "\r" not in output


def test_training_goes_on_when_nobody_reads_what_it_says(config: Config, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(config.to_yaml())
    with start_sana(tmp_path, "train", "--config", "small.yaml") as process:
        assert process.stderr is not None
        assert process.stdout is not None
        process.stderr.readline()
        process.stderr.close()
        said = process.stdout.read()
    assert process.returncode == 0
    assert said.strip() == str(config.run.dir / "checkpoints" / "step-000004")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_the_last_whole_step(
    sana: Sana, small: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    assert sana("embed", "--config", "small.yaml", "--limit", "50").returncode == 0
    long = ("--set", "train.steps=100000", "--set", "save.every=100000")
    process = start_sana(tmp_path, "train", "--config", "small.yaml", *long)
    metrics = tmp_path / "runs" / "small" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") > 3, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == code, output
    folder = checkpoint.steps(tmp_path / "runs" / "small")[-1]
    assert f"stopped after step {checkpoint.step_of(folder)}, which is saved" in output
    assert list(checkpoint.verify(folder, hashes=True))


def test_sigterm_ends_embedding_and_leaves_no_dataset(small: Path, tmp_path: Path) -> None:
    process = start_sana(tmp_path, "embed", "--config", "small.yaml")
    wait_until(
        lambda: (tmp_path / "data" / "quickstart.partial" / "captions-00000.safetensors").exists(), process
    )
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[1]
    assert (process.returncode, "error: terminated" in output) == (143, True)
    assert not (tmp_path / "data" / "quickstart").exists()


def test_a_signal_in_a_callback_of_python_prints_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """Python swallows it there; other errors in callbacks are still reported."""

    class Dropped:
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def __del__(self) -> None:
            raise self.error

    reported = list[object]()
    kept, sys.unraisablehook = sys.unraisablehook, lambda unraisable: reported.append(unraisable.exc_value)
    try:
        with interrupts.handling(interrupts.raise_asked):
            Dropped(interrupts.Asked(15))
            assert reported == []
            Dropped(ValueError("wrong"))
            assert [str(error) for error in reported] == ["wrong"]
    finally:
        sys.unraisablehook = kept
