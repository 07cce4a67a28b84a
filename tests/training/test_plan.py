"""What a dry run says, against the run that follows."""

import pytest
from helpers import HELD_OUT, again, embedded, trained

from sana_cli.commands.train import TrainOptions, plan
from sana_cli.config.keys import Config


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
    assert sum(sizes) == pytest.approx(
        found.checkpoint_bytes, rel=0.2
    )  # small tensors, whose names take as much
    assert found.disk_bytes == 3 * found.checkpoint_bytes
    assert found.memory is not None
