"""A checkpoint that cannot be written leaves the last one intact; the card of one that can."""

import errno
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import again, trained

from sana_cli.config.keys import Config
from sana_cli.errors import SanaError
from sana_cli.runtime import files
from sana_cli.training.trainer import Trainer
from sana_cli.weights import checkpoint


def test_no_checkpoint_with_numbers_that_are_not_finite(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Trainer.weights

    def broken(self: Trainer) -> dict[str, torch.Tensor]:
        weights = {name: tensor.clone() for name, tensor in honest(self).items()}
        weights["proj_out.bias"][0] = math.inf
        return weights

    monkeypatch.setattr(Trainer, "weights", broken)
    with pytest.raises(
        SanaError, match=r"step 2: proj_out\.bias is not finite, so no checkpoint was written"
    ):
        trained(config)
    assert checkpoint.steps(config.run.dir) == []


def test_a_full_disk_leaves_the_last_checkpoint(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(again(config, "train.steps=2", "save.keep=1"))
    honest = files.write_tensors

    def full(path: Path, *rest: Any) -> None:
        honest(path, *rest)
        if path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(SanaError, match=r"the disk is full: writing .*step-000004"):
        trained(again(config, "save.keep=1"), resume="auto")
    folder, skipped = checkpoint.newest_step(config.run.dir, hashes=True)
    assert folder is not None
    assert (folder.name, skipped) == ("step-000002", [])


def test_the_card_shows_the_newest_grid(config: Config) -> None:
    """A step is saved before it is sampled: step 4 shows the grid of step 2, step 2 none."""
    summary = trained(again(config, "save.every=2", "log.sample_every=2", "save.keep=2"))
    first, last = checkpoint.steps(summary.run)
    assert not (first / "samples.png").exists()
    assert "![" not in (first / "README.md").read_text()
    assert (last / "samples.png").read_bytes() == (summary.run / "samples" / "step-000002.png").read_bytes()
    assert "![Samples at step 2, by prompt](samples.png)" in (last / "README.md").read_text()
    assert "samples.png" in list(checkpoint.verify(last, hashes=True))
