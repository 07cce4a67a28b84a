"""Losses by noise level, and the same numbers in TensorBoard."""

import json
import re

import pytest
from helpers import HELD_OUT, again, close, embedded, metrics_lines, trained

from sana_cli.commands.train import TrainOptions, TrainStep, train
from sana_cli.config.keys import Config
from sana_cli.errors import SanaError
from sana_cli.training import metrics


def test_losses_by_bin_are_means() -> None:
    counted = metrics.Losses()
    counted.add([1.0, 3.0, 5.0, 7.0], [0.0, 0.09, 0.95, 1.0])
    assert counted.mean == 4
    assert counted.bins() == {"loss": [2.0, *[None] * 8, 6.0], "images": [2, *[0] * 8, 2]}
    taken_up = metrics.Losses.from_state(json.loads(json.dumps(counted.state())))
    assert vars(taken_up) == vars(counted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_the_same_numbers_also_after_resuming(config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched = again(config, *HELD_OUT, "log.tensorboard=true", "log.sample_every=2")
    embedded(watched)
    steps = train(TrainOptions(watched))
    for step in steps:
        if isinstance(step, TrainStep) and step.step == 3:  # one step after the checkpoint
            close(steps)
            break
    trained(watched, resume="auto")
    events = EventAccumulator(str(watched.run.dir / "tensorboard"))
    events.Reload()
    lines = metrics_lines(watched.run.dir)
    for key in ("loss", "lr", "grad_norm", "held_out_loss"):
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == {line["step"]: pytest.approx(line[key], rel=1e-6) for line in lines if key in line}
    assert {event.step for event in events.Images("samples")} == {0, 2, 4}
    bins = [tag for tag in events.Tags()["scalars"] if tag.startswith("sigma_bins/")]
    assert all(re.fullmatch(r"sigma_bins/0\.\d-[01]\.\d", tag) for tag in bins)
    assert bins


def test_missing_tensorboard_is_refused_before_anything_is_done(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda _: None)
    with pytest.raises(
        SanaError, match=r"TensorBoard is not installed\npip install 'sana-cli\[tensorboard\]'"
    ):
        trained(again(config, "log.tensorboard=true"))
    assert not config.run.dir.exists()
