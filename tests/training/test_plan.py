"""The figures of a dry run against the run that follows."""

from pathlib import Path

import pytest
from helpers import HELD_OUT, again, embedded, trained

from sana_cli.commands.train import TrainOptions, plan
from sana_cli.config.keys import Config
from sana_cli.errors import SanaError


def test_a_dry_run_reports_and_writes_nothing(config: Config) -> None:
    watched = again(config, *HELD_OUT)
    embedded(watched)
    folder = watched.data.dir.parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    found = plan(TrainOptions(watched))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert (found.steps, found.batch, found.images, found.held_out_images) == (4, 4, 40, 9)
    assert found.epochs == 4 * 4 / 40
    sizes = [path.stat().st_size for path in trained(watched).checkpoint.rglob("*.safetensors")]
    # rel: in a small model, the tensors' names take much of the file
    assert sum(sizes) == pytest.approx(found.checkpoint_bytes, rel=0.2)
    assert found.disk_bytes == 3 * found.checkpoint_bytes
    assert found.memory is not None


def test_a_dry_run_refuses_what_training_would(config: Config, tmp_path: Path) -> None:
    with pytest.raises(SanaError, match="no checkpoint at"):
        plan(TrainOptions(config, resume=str(tmp_path / "nowhere")))
    with pytest.raises(SanaError, match="no checkpoint at"):
        plan(TrainOptions(again(config, f"train.init_from={tmp_path / 'nowhere'}")))
    trained(config)
    with pytest.raises(SanaError, match="has checkpoints already"):
        plan(TrainOptions(config))
    with pytest.raises(SanaError, match="optim.lr: the run has"):
        plan(TrainOptions(again(config, "optim.lr=0.5"), resume="auto"))
    found = plan(TrainOptions(again(config, "train.batch_size=2", "train.accumulate=2"), resume="auto"))
    assert (found.batch, found.micro_batch, found.micro_batches) == (4, 2, 2)
