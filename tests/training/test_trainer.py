"""A step's gradient, computed in different ways, and the held-out loss."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import HELD_OUT, again, embedded, make_trainer, metrics_lines, rectified_flow, trained
from torch.utils._python_dispatch import TorchDispatchMode

from sana_cli.config.keys import Config
from sana_cli.dataset.layout import held_out_dir
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import SingleDataset
from sana_cli.training import batches
from sana_cli.weights import checkpoint


@pytest.mark.parametrize("recomputed", [False, True])
def test_autocast_casts_a_parameter_once_a_step(
    config: Config, monkeypatch: pytest.MonkeyPatch, recomputed: bool
) -> None:
    """Once for all micro-batches; the gradient is the float32 sum of their own."""
    monkeypatch.setattr("sana_cli.kernels.has_native_bf16", lambda _: True)
    cut = again(config, "train.accumulate=3", f"train.activation_checkpointing={str(recomputed).lower()}")
    one, other = (make_trainer(cut, 12, "bf16") for _ in range(2))
    weight = one.model.transformer_blocks[0].get_parameter("attn1.to_out.0.weight")
    casts = 0

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal casts
            casts += func is torch.ops.aten._to_copy.default and args[0] is weight
            return func(*args, **(kwargs or {}))

    with Casts():  # type: ignore[no-untyped-call]
        one._gradients(lambda: None)
    assert casts == 1
    for first in (0, 4, 8):
        objective = other.task.objective
        batch = batches.training_batch(other.task.train_set, objective, 0, np.arange(first, first + 4))
        (objective.losses(other.model, batch)["loss"].sum() / 12).backward()
    one.close()
    other.close()
    expected = dict(other.model.named_parameters())
    for name, parameter in one.model.named_parameters():
        found, wanted = parameter.grad, expected[name].grad
        assert found is not None
        assert wanted is not None
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-8), name


def test_held_out_loss_is_that_of_the_averaged_weights_on_fixed_draws(config: Config) -> None:
    """Against a computation image by image, with the saved weights."""
    watched = again(config, *HELD_OUT)
    embedded(watched)
    summary = trained(watched)
    model = checkpoint.load_transformer(summary.checkpoint)
    held_out = SingleDataset(Dataset(held_out_dir(watched.data.dir, "test")), seed=0)
    objective, losses = rectified_flow(watched), []
    for image in range(9):
        batch = batches.held_out_batch(held_out, objective, 0, np.array([image]), 9)
        with torch.no_grad():
            losses.append(float(objective.losses(model, batch)["loss"]))
    line = metrics_lines(watched.run.dir)[-1]
    assert line["held_out_loss"] == pytest.approx(sum(losses) / 9, rel=1e-5)
    assert summary.held_out_loss == line["held_out_loss"]


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_give_the_same_run(config: Config) -> None:
    plain = trained(again(config, f"run.dir={config.run.dir}-plain", "train.steps=2"))
    compiled = trained(again(config, "train.compile=true", "train.steps=2"))
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)
