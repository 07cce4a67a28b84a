"""Sample grids of a run: they disturb nothing, and one that fails is a warning."""

from typing import Any

import pytest
from helpers import again, assert_same_tensors, checkpoint_tensors, trained

from sana_cli.commands.train import TrainOptions, TrainStep, TrainSummary, train
from sana_cli.config.keys import Config


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
