"""Runs that are killed, stopped and cut short: real processes, real signals. Nothing that was whole is lost."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import child, process_environment, small_config
from safetensors.torch import load_file

from sana_cli import cli, flow
from sana_cli.commands.embed import EmbedOptions, embed
from sana_cli.commands.train import TrainOptions, TrainSummary, train
from sana_cli.config.keys import Config
from sana_cli.runtime import files
from sana_cli.training import trainer
from sana_cli.weights import checkpoint

KILLS = 50
WAIT = 10.0  # seconds that a stop may take


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = ("transformer/diffusion_pytorch_model.safetensors", "training/raw.safetensors", "training/optimizer.safetensors")
    return {f"{name}:{key}": tensor for name in files for key, tensor in load_file(folder / name).items()}


def last_line(run: Path) -> int:
    """The step of the last whole line of the metrics: the run got so far at least."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    whole = text.splitlines()[: text.count("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def being_written(partial: Path) -> set[tuple[str, int]]:
    """The folders in there, told apart from others of the same name."""
    with contextlib.suppress(FileNotFoundError):  # it comes and goes
        return {(path.name, path.stat().st_ctime_ns) for path in partial.iterdir()}
    return set()


def test_fifty_kills_lose_no_more_than_the_steps_since_the_last_checkpoint(config: Config) -> None:
    """SIGKILL at random moments, half of them inside a save; what comes out in the end is a run that was never killed."""
    every, steps = 3, 700

    def cut(name: str) -> Config:
        return small_config(
            config.data.dir.parent, f"run.dir={config.run.dir}-{name}", f"train.steps={steps}", f"train.save_every={every}",
            "train.sample_every=1000000", "train.ema_decay=0.9",
        )  # fmt: skip

    straight, killed = cut("straight"), cut("killed")
    *_, summary = train(TrainOptions(straight))
    assert isinstance(summary, TrainSummary)
    chance, saving, resumed = random.Random(0), 0, 0
    partial = killed.run.dir / "checkpoints.partial"
    for number in range(KILLS):
        saved, begun = checkpoint.steps(killed.run.dir), being_written(partial)  # by those before
        process = child(lambda: list(train(TrainOptions(killed, resume="auto"))))
        deadline = time.monotonic() + 60
        if number % 2:  # after a save, wherever it is then
            while checkpoint.steps(killed.run.dir)[-1:] == saved[-1:] and process.is_alive():
                assert time.monotonic() < deadline
            time.sleep(chance.uniform(0, 0.25))
        else:  # inside one
            while not being_written(partial) - begun and process.is_alive():
                assert time.monotonic() < deadline
            time.sleep(chance.uniform(0, 0.004))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed: raise its steps"
        saving += partial.is_dir()
        reached = last_line(killed.run.dir)
        folder, _ = checkpoint.newest_step(killed.run.dir, hashes=True)
        there = 0 if folder is None else checkpoint.step_of(folder)
        assert reached - there <= every, (number, reached, there)
        resumed += folder is not None
    assert saving >= KILLS // 5, "too few were killed inside a save"
    assert resumed >= KILLS - 5
    *_, finished = train(TrainOptions(killed, resume="auto"))
    assert isinstance(finished, TrainSummary)
    assert 0 < finished.first_step < steps
    expected = tensors(summary.checkpoint)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(finished.checkpoint).items())
    losses = [
        [json.loads(line)["loss"] for line in (run.run.dir / "metrics.jsonl").read_text().splitlines()]
        for run in (straight, killed)
    ]
    assert losses[0] == losses[1]


def sana_train(config: Config) -> None:
    """`sana train --resume auto`, in this process."""
    path = config.run.dir.with_suffix(".yaml")
    path.write_text(config.to_yaml())
    cli.app(["train", "--config", str(path), "--resume", "auto"], prog_name="sana")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("during", ["step", "sampling", "saving", "held-out loss"])
def test_a_signal_saves_the_last_whole_step(
    config: Config, monkeypatch: pytest.MonkeyPatch, during: str, number: signal.Signals, code: int
) -> None:
    def cut(*overrides: str) -> Config:
        common = (
            "train.schedule=constant",
            "train.save_every=1000",
            "train.sample_every=1000",
            "train.batch_size=2",
            "train.accumulate=2",
        )
        return small_config(config.data.dir.parent, *common, *overrides)

    *_, first = train(TrainOptions(cut("train.steps=5")))
    assert isinstance(first, TrainSummary)
    untouched, mark = tensors(first.checkpoint), config.run.dir.parent / "mark"

    def slow(place: Any, name: str) -> None:
        honest = getattr(place, name)

        def slowed(*arguments: Any, **more: Any) -> Any:
            mark.touch()
            time.sleep(0.2)
            return honest(*arguments, **more)

        monkeypatch.setattr(place, name, slowed)

    if during == "step":  # the first micro-batch of two
        overrides = ["train.steps=100000"]
        slow(trainer, "batch_loss")
    elif during == "sampling":  # it would take hours
        overrides = ["train.steps=100000", "train.sample_every=7", "sample.steps=1000000"]
        slow(flow, "guide")
    elif during == "saving":
        overrides = ["train.steps=100000", "train.save_every=7"]
        slow(files, "write_tensors")
    else:
        overrides = ["train.steps=100000", "data.held_out_split=test", "train.held_out_every=7", "train.held_out_images=100000"]
        list(embed(EmbedOptions(cut(*overrides), limit=40)))
        slow(trainer, "held_out_batch")
    process = child(lambda: sana_train(cut(*overrides)))
    deadline = time.monotonic() + 60
    while not mark.exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(WAIT)
    assert process.exitcode == code
    newest, skipped = checkpoint.newest_step(config.run.dir, hashes=True)
    assert newest is not None
    assert skipped == []
    assert checkpoint.step_of(newest) == (5 if during == "step" else 7)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in tensors(first.checkpoint).items())


def test_a_second_signal_leaves_at_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = config.run.dir.parent / "mark"

    def stuck(*_: object, **__: object) -> None:
        mark.touch()
        while True:
            time.sleep(0.01)

    monkeypatch.setattr("sana_cli.training.trainer.batch_loss", stuck)
    process = child(lambda: sana_train(config))
    while not mark.exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(0.5)
    assert process.is_alive()  # it would finish its micro-batch
    os.kill(process.pid, signal.SIGINT)
    process.join(WAIT)
    assert process.exitcode == 130


@pytest.mark.parametrize("after", [0.1, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0])
def test_a_signal_during_start_up_leaves_everything_as_it_was(config: Config, tmp_path: Path, after: float) -> None:
    (tmp_path / "small.yaml").write_text(config.to_yaml())
    list(train(TrainOptions(config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})}))))

    def there() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (config.run.dir / "checkpoints").rglob("*") if path.is_file()}

    before = there()
    process = subprocess.Popen(
        [sys.executable, "-m", "sana_cli", "train", "--config", "small.yaml", "--resume", "auto", "--set", "train.steps=100000"],
        cwd=tmp_path, env=process_environment(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    time.sleep(after)
    process.send_signal(signal.SIGTERM)
    try:
        _, err = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    if process.returncode != 143:  # Python itself had not begun, on a busy machine
        assert (after, process.returncode, err) == (0.1, -signal.SIGTERM, "")
    assert "Traceback" not in err
    now = there()
    assert all(now[name] == content for name, content in before.items() if name in now)
    folder, skipped = checkpoint.newest_step(config.run.dir, hashes=True)
    assert folder is not None
    assert skipped == []
    assert checkpoint.step_of(folder) >= 2


def test_a_lost_terminal_is_no_concern_under_nohup(config: Config, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(config.to_yaml())
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["nohup", sys.executable, "-m", "sana_cli", "train", "--config", "small.yaml", "--set", "train.steps=100"],
            cwd=tmp_path, env=process_environment(tmp_path), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
        )  # fmt: skip
    deadline = time.monotonic() + 60
    while last_line(config.run.dir) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    told = log.read_text()
    assert "train 100/100  loss " in told
    assert "\x1b" not in told
    assert "\r" not in told
