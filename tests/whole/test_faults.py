"""Failures around a run: disks, memory, clocks, vanished files, flipped bits."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import again, sampled, trained

from sana_cli.commands.embed import EmbedOptions, embed
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.keys import Config
from sana_cli.errors import SanaError
from sana_cli.weights import checkpoint


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system; skips the test if it cannot be mounted."""
    place = tmp_path / "small-disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=False)


def fill(place: Path) -> None:
    """Fill the file system completely."""
    with (place / "fill").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass


def test_a_full_disk_leaves_what_was_whole(config: Config, full_disk: Path) -> None:
    run = full_disk / "run"
    with pytest.raises(SanaError, match="the disk is full") as caught:
        trained(
            again(
                config,
                f"run.dir={run}",
                "train.steps=60",
                "save.every=1",
                "save.keep=50",
                "log.sample_every=60",
            )
        )
    assert "finished work is kept" in str(caught.value)
    folder, skipped = checkpoint.newest_step(run, hashes=True)
    assert folder is not None
    assert skipped == []
    assert checkpoint.load_transformer(folder)
    with pytest.raises(SanaError, match="the disk is full|needs at least"):
        list(embed(EmbedOptions(config, out=full_disk / "data", limit=20_000)))
    assert not (full_disk / "data").exists()
    fill(full_disk)
    with pytest.raises(SanaError, match="the disk is full"):
        sampled(folder, *["4"] * 64, out=full_disk / "grid.png")
    assert not list(full_disk.glob("grid*"))


def test_files_that_vanish_are_one_message(config: Config) -> None:
    steps = train(TrainOptions(config))
    next(steps)
    shutil.rmtree(config.data.dir)  # memory-mapped, so training continues
    list(steps)
    with pytest.raises(SanaError, match="no dataset in"):
        next(iter(train(TrainOptions(config))))
    folder = checkpoint.newest_step(config.run.dir)[0]
    assert folder is not None
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(SanaError, match=r"config\.json is missing"):
        checkpoint.find_checkpoint(folder)


def test_the_clock_may_jump(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)  # durations come from monotonic clocks
    assert 0 < trained(config).seconds < 600
    for step in checkpoint.steps(config.run.dir):  # files from the future
        os.utime(step / checkpoint.MANIFEST, (4e9, 4e9))
    assert checkpoint.find_checkpoint(config.run.dir).name == "step-000004"


def test_two_hundred_flipped_bits_of_a_checkpoint_are_found(config: Config) -> None:
    """For a dataset, see `dataset/test_reader.py`."""
    folder = trained(config).checkpoint
    chance, paths = random.Random(0), sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(200):
        path = chance.choice(paths)
        whole = path.read_bytes()
        at = chance.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :])
        with pytest.raises(SanaError, match=path.name):
            list(checkpoint.verify(folder, hashes=True))
        path.write_bytes(whole)
    assert len(list(checkpoint.verify(folder, hashes=True))) == len(paths)
