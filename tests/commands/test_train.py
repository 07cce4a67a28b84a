"""The order of steps, checkpoints and grids in a run, and what stops it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    again,
    assert_same_tensors,
    checkpoint_tensors,
    embedded,
    rectified_flow,
    small_config,
    train_set,
    trained,
)
from torch import Tensor

from sana_cli.commands.train import TrainOptions, TrainStep, train
from sana_cli.config.keys import Config
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.sampling import pictures, sampler
from sana_cli.training.batches import training_batch
from sana_cli.training.objective import MicroBatch, RectifiedFlow
from sana_cli.weights import checkpoint


def test_steps_report_and_grids_are_drawn(config: Config) -> None:
    steps = [step for step in train(TrainOptions(config)) if isinstance(step, TrainStep)]
    assert [step.step for step in steps] == [0, 1, 2, 3, 4]
    assert [step.sampled is not None for step in steps] == [True, False, False, False, True]
    assert [step.saved is not None for step in steps] == [False, False, True, False, True]
    record = pictures.read_record(config.run.dir / "samples" / "step-000004.png")
    assert record.as_json()["images"] == [[{"prompt": "4", "seed": 0}, {"prompt": "two", "seed": 1}]]
    files = ["checkpoints", "config.yaml", "metrics.jsonl", "report.html", "samples"]
    assert sorted(path.name for path in config.run.dir.iterdir()) == files
    assert sorted((config.run.dir / "checkpoints").iterdir()) == checkpoint.steps(config.run.dir)


def test_a_small_model_learns_what_the_prompts_mean(tmp_path: Path) -> None:
    """Zeros and ones: a sample for a word is nearer to the mean image of that word."""
    config = small_config(
        tmp_path, "train.steps=250", "train.batch_size=32", "optim.lr=8e-3",
        "optim.warmup_steps=20", "optim.ema_decay=0.97", "save.every=250", "log.sample_every=250",
        "model.num_attention_heads=8", "model.num_layers=2", "sample.steps=8",
        "model.num_cross_attention_heads=8", "model.patch_size=4",
    )  # fmt: skip
    embedded(config, limit=400)
    summary = trained(config)
    dataset = Dataset(config.data.dir)
    ids, names = dataset.attribute_ids()[:, 0].numpy(), dataset.attributes["label"]
    means = torch.stack(
        [dataset.images(np.flatnonzero(ids == names.index(str(digit)))).mean(0) for digit in range(10)]
    )
    model = checkpoint.load_transformer(summary.checkpoint)
    texts, null = dataset.texts(), dataset.states([dataset.index.null_caption])[0]
    prompts = [(0, "0"), (0, "zero"), (1, "1"), (1, "one")] * 8
    states = [dataset.states([texts.index(word)])[0] for _, word in prompts]
    recipe = sampler.Recipe(config.sample, dataset.image_shape, config.objective.prediction_type, "fp32")
    images = sampler.final_images(sampler.sample_images(model, states, [null] * 32, list(range(32)), recipe))
    assert float(images.mean()) == pytest.approx(float(dataset.images(np.arange(400)).mean()), abs=0.25)
    right = 0
    for (digit, _), image in zip(prompts, images, strict=True):
        distance = [float((image - means[d]).square().mean()) for d in (0, 1)]
        right += int(distance[digit] < distance[1 - digit])
    assert right >= 28


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_weights_move(
    config: Config, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    honest, calls = RectifiedFlow.losses, 0

    def poisoned(self: RectifiedFlow, transformer: torch.nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        losses = honest(self, transformer, batch)
        if calls != 4:
            return losses
        if what == "gradient":
            losses["loss"].register_hook(lambda gradient: gradient * math.nan)
            return losses
        return {"loss": losses["loss"] * torch.tensor([1.0, math.nan, 1.0, 1.0])}

    shorter = ("train.steps=3", "save.every=3", "optim.schedule=constant")
    straight = trained(again(config, f"run.dir={config.run.dir}-straight", *shorter))
    monkeypatch.setattr(RectifiedFlow, "losses", poisoned)
    config = again(config, "save.every=4", "optim.schedule=constant")
    with pytest.raises(SanaError) as caught:
        trained(config)
    batch = training_batch(train_set(config), rectified_flow(config), 0, np.arange(12, 16))
    ids = Dataset(config.data.dir).sample_ids(batch.rows)
    sigma = [f"{value:.3f}" for value in batch.sigma.tolist()]
    named = (
        f"sigma {sigma[1]} to {sigma[1]}, samples {ids[1]}" if what == "loss" else f"samples {', '.join(ids)}"
    )
    first, second, third, fourth = str(caught.value).splitlines()
    assert first == f"step 4: the {what} is not finite; weights are untouched"
    assert named in second
    assert third == f"step 3 is saved in {config.run.dir}/checkpoints/step-000003"
    assert "--set train.init_from=" in fourth
    saved = checkpoint_tensors(checkpoint.steps(config.run.dir)[-1])
    assert_same_tensors(saved, checkpoint_tensors(straight.checkpoint))  # exactly the weights of step 3
    monkeypatch.setattr(RectifiedFlow, "losses", honest)
    assert trained(config, resume="auto").first_step == 3


def test_out_of_memory_names_what_to_change(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(RectifiedFlow, "losses", full)
    with pytest.raises(SanaError, match=r"step 1: out of memory on cpu") as caught:
        trained(config)
    for key in ("batch_size", "accumulate", "activation_checkpointing", "precision"):
        assert f"train.{key}" in str(caught.value)
