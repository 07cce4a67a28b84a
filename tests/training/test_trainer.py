"""A step's gradient, computed in different ways, and the held-out loss."""

from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from helpers import (
    HELD_OUT,
    again,
    assert_same_tensors,
    checkpoint_tensors,
    embedded,
    make_trainer,
    metrics_lines,
    rectified_flow,
    trained,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sana_cli.config.keys import Config
from sana_cli.dataset.layout import held_out_dir
from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import SingleDataset
from sana_cli.errors import SanaError
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
def test_compiled_blocks_give_the_same_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to the plain one; the same to the bit when it is resumed, compiled as it began though `auto` would not."""
    steps = ("train.steps=4", "save.every=2", "save.keep=9", "log.sample_every=2")

    def in_folder(name: str, *overrides: str) -> Config:
        return again(config, f"run.dir={config.run.dir}-{name}", *steps, *overrides)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = trained(in_folder("plain"))
    whole = trained(in_folder("whole", "train.compile=true"))
    assert whole.loss == pytest.approx(plain.loss, rel=1e-4)
    # one graph serves every batch, however many captions it has and however long
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    first = whole.checkpoint.with_name(checkpoint.step_name(2))
    assert checkpoint.read_state(first).compiled
    assert not checkpoint.read_state(plain.checkpoint).compiled
    torch._dynamo.reset()  # another process would start so
    resumed = trained(in_folder("resumed"), resume=str(first))
    assert checkpoint.read_state(resumed.checkpoint).compiled
    assert_same_tensors(checkpoint_tensors(whole.checkpoint), checkpoint_tensors(resumed.checkpoint))

    monkeypatch.setattr("sana_cli.commands.train.compiling.missing_compiler", lambda _device: "a compiler")
    elsewhere = trained(in_folder("elsewhere"), resume=str(first))
    assert elsewhere.loss == pytest.approx(whole.loss, rel=1e-4)
    assert not checkpoint.read_state(elsewhere.checkpoint).compiled
    monkeypatch.setattr("sana_cli.training.plan.missing_compiler", lambda _device: "a compiler")
    with pytest.raises(SanaError, match=r"train\.compile: this machine lacks a compiler"):
        trained(in_folder("refused", "train.compile=true"))
