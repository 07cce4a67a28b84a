"""Real processes killed by SIGKILL: nothing that was complete is lost."""

import contextlib
import random
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

from helpers import (
    Sana,
    again,
    assert_same_tensors,
    checkpoint_tensors,
    child,
    metrics_lines,
    start_sana,
    trained,
    wait_until,
)
from PIL import Image
from safetensors.torch import load_file

from sana_cli.config.keys import Config
from sana_cli.training import metrics
from sana_cli.weights import checkpoint

KILLS = 50


def last_line(run: Path) -> int:
    """The step of the last complete line of metrics, which the run has reached."""
    path = run / metrics.METRICS
    return max((line["step"] for line in metrics.read(path)), default=0) if path.is_file() else 0


def being_written(partial: Path) -> set[tuple[str, int]]:
    """The folders in `partial`, each with its time, since names repeat."""
    with contextlib.suppress(FileNotFoundError):  # it exists only during a save
        return {(path.name, path.stat().st_ctime_ns) for path in partial.iterdir()}
    return set()


def test_fifty_kills_lose_no_more_than_the_steps_since_the_last_checkpoint(config: Config) -> None:
    """At random moments, half inside a save; the final weights are those of an unkilled run."""
    every, steps = 3, 700

    def cut(name: str, save_every: int) -> Config:
        return again(
            config, f"run.dir={config.run.dir}-{name}", f"train.steps={steps}", f"save.every={save_every}",
            "log.sample_every=1000000", "optim.ema_decay=0.9",
        )  # fmt: skip

    straight, killed = cut("straight", steps), cut("killed", every)
    summary = trained(straight)
    chance, saving, resumed = random.Random(0), 0, 0
    partial = killed.run.dir / "checkpoints.partial"
    for number in range(KILLS):
        saved, begun = checkpoint.steps(killed.run.dir), being_written(partial)  # of earlier processes
        process = child(lambda: trained(killed, resume="auto"))
        deadline = time.monotonic() + 60
        if number % 2:  # at a random moment after a save
            while checkpoint.steps(killed.run.dir)[-1:] == saved[-1:] and process.is_alive():
                assert time.monotonic() < deadline
            time.sleep(chance.uniform(0, 0.15))
        else:  # inside a save
            while not being_written(partial) - begun and process.is_alive():
                assert time.monotonic() < deadline
            time.sleep(chance.uniform(0, 0.004))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it was killed: raise its steps"
        saving += partial.is_dir()
        reached = last_line(killed.run.dir)
        folder, _ = checkpoint.newest_step(killed.run.dir, hashes=True)
        there = 0 if folder is None else checkpoint.step_of(folder)
        assert reached - there <= every, (number, reached, there)
        resumed += folder is not None
    assert saving >= KILLS // 5, "too few kills hit a save"
    assert resumed >= KILLS - 5
    finished = trained(cut("killed", steps), resume="auto")
    assert 0 < finished.first_step < steps
    assert_same_tensors(checkpoint_tensors(finished.checkpoint), checkpoint_tensors(summary.checkpoint))
    losses = [[line["loss"] for line in metrics_lines(run.run.dir)] for run in (straight, killed)]
    assert losses[0] == losses[1]


def test_a_killed_sample_leaves_pictures_whole(config: Config, tmp_path: Path) -> None:
    summary = trained(config)
    grid, film = tmp_path / "o.png", tmp_path / "o.gif"
    prompts = ["4 two six one nine seven"] * 20
    options = [
        "--checkpoint",
        str(summary.checkpoint),
        "--steps",
        "20",
        "--out",
        str(grid),
        "--trajectory",
        str(film),
    ]

    def start() -> subprocess.Popen[str]:
        return start_sana(tmp_path, "sample", *prompts, *options)

    inside = 0
    for unfinished in ("o.png.partial", "o.gif.partial", "o.gif.partial"):
        process = start()
        while process.poll() is None and not (tmp_path / unfinished).exists():
            pass
        process.kill()
        process.communicate()
        inside += (tmp_path / unfinished).exists()
        for path in (grid, film):
            if path.exists():
                with Image.open(path) as image:
                    image.seek(getattr(image, "n_frames", 1) - 1)
                    image.load()
    assert inside, "no kill hit a file being written"
    last = start()
    _, err = last.communicate()
    assert last.returncode == 0, err
    assert not list(tmp_path.glob("*.partial"))


def newer_step(run: Path, name: str) -> bool:
    """Whether a step after `name` is complete."""
    return any(step.name > name and (step / "manifest.json").exists() for step in checkpoint.steps(run))


def is_writing(run: Path, file: str) -> bool:
    """Whether this file of a checkpoint is being written."""
    return any(run.glob(f"checkpoints.partial/step-*/{file}"))


def test_sigkill_in_the_middle_of_a_save_leaves_the_earlier_checkpoint(
    sana: Sana, small: Path, tmp_path: Path
) -> None:
    assert sana("embed", "--config", "small.yaml", "--limit", "50").returncode == 0
    run, long = tmp_path / "runs" / "small", ("--set", "train.steps=100000", "--set", "save.every=1")
    inside = 0
    for attempt in range(4):
        process = start_sana(tmp_path, "train", "--config", "small.yaml", *long, "--resume", "auto")
        before = checkpoint.newest_step(run)[0]
        name = before.name if before else ""
        wait_until(partial(newer_step, run, name), process)
        files = ("training/raw.safetensors", "transformer/config.json", "training/state.json", "sana.json")
        wait_until(partial(is_writing, run, files[attempt]), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        inside += any(run.glob("checkpoints.partial/step-*"))
        folder, skipped = checkpoint.newest_step(run, hashes=True)
        assert folder is not None
        assert skipped == []
        assert load_file(folder / "training" / "raw.safetensors")
    assert inside >= 2, "too few kills hit a save"
    assert folder is not None
    resumed = sana(
        "train",
        "--config",
        "small.yaml",
        "--set",
        f"train.steps={checkpoint.step_of(folder) + 2}",
        "--resume",
        "auto",
    )
    assert resumed.returncode == 0, resumed.stderr
