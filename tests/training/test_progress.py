"""Lines of metrics against the steps that they describe."""

import numpy as np
import pytest
from helpers import HELD_OUT, again, embedded, metrics_lines, rectified_flow, train_set

from sana_cli.commands.train import TrainOptions, TrainStep, train
from sana_cli.config.keys import Config
from sana_cli.training.batches import training_batch


def test_the_lines_say_what_the_steps_were(config: Config) -> None:
    watched = again(config, *HELD_OUT)
    embedded(watched)
    steps = [step for step in train(TrainOptions(watched)) if isinstance(step, TrainStep)]
    found = metrics_lines(watched.run.dir)
    assert [line["loss"] for line in found] == [step.loss for step in steps[1:]]
    data, objective = train_set(watched), rectified_flow(watched)
    for line in found:
        first = 4 * (line["step"] - 1)
        sigma = training_batch(data, objective, 0, np.arange(first, first + 4)).sigma
        counts = np.histogram(sigma.numpy(), bins=10, range=(0, 1))[0].tolist()
        assert line["sigma_bins"]["images"] == counts
        total = sum(
            mean * count for mean, count in zip(line["sigma_bins"]["loss"], counts, strict=True) if count
        )
        assert total / 4 == pytest.approx(line["loss"], rel=1e-12)
        assert 0 <= line["data_wait"] <= 1
        assert {"lr", "grad_norm", "samples_per_second", "memory_bytes"} <= line.keys()
        assert ("held_out_loss" in line) == (line["step"] % 2 == 0)
    held_out = [found[1]["held_out_loss"], found[3]["held_out_loss"]]
    assert [step.held_out_loss for step in steps[1:]] == [None, held_out[0], held_out[0], held_out[1]]
