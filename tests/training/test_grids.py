"""Sample grids of a run: they do not change training, and a failed one is only a warning."""

from typing import Any

import pytest
from helpers import again, assert_same_tensors, checkpoint_tensors, trained

from sana_cli.commands.train import TrainOptions, TrainStep, TrainSummary, train
from sana_cli.config.keys import Config
from sana_cli.training import grids, trainer
from sana_cli.training.trainer import Trainer


def test_sampling_leaves_training_as_it_was(config: Config) -> None:
    often = trained(again(config, "log.sample_every=1", f"run.dir={config.run.dir}-often"))
    seldom = trained(config)
    assert len(list((often.run / "samples").iterdir())) > len(list((seldom.run / "samples").iterdir()))
    assert_same_tensors(checkpoint_tensors(seldom.checkpoint), checkpoint_tensors(often.checkpoint))


def test_a_failing_sampling_step_warns_and_training_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    undisturbed = trained(again(config, f"run.dir={config.run.dir}-plain"))
    monkeypatch.setattr("sana_cli.sampling.sampler.sample_images", fails)
    *steps, summary = train(TrainOptions(config))
    assert isinstance(summary, TrainSummary)
    assert (summary.steps, summary.grid) == (4, None)
    warnings = [(step.step, step.warning) for step in steps if isinstance(step, TrainStep) and step.warning]
    assert warnings == [(step, f"no samples at step {step}: out of memory") for step in (0, 4)]
    assert summary.loss == undisturbed.loss


def test_a_gathered_model_without_room_is_only_a_warning(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the whole model of a sharded run does not fit on the device of rank 0."""

    def no_room(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(grids, "_whole", no_room)
    monkeypatch.setattr(Trainer, "sharded", property(lambda _: True, lambda _, __: None), raising=False)
    monkeypatch.setattr(trainer, "shard", lambda *_: None)
    *steps, summary = train(TrainOptions(config))
    assert isinstance(summary, TrainSummary)
    assert summary.steps == 4
    warnings = [step.warning for step in steps if isinstance(step, TrainStep) and step.warning]
    assert warnings == [f"no samples at step {step}: CUDA out of memory" for step in (0, 4)]
