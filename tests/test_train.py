"""Training against what must hold: accumulation is a larger batch, resuming is not having stopped, guidance data is drawn."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import embedded, small_config
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from sana_cli import flow
from sana_cli.commands.train import TrainOptions, TrainStart, TrainStep, TrainSummary, train
from sana_cli.config.keys import Config, TrainConfig
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import Interrupted, SanaError
from sana_cli.runtime import files
from sana_cli.sampling import pictures, sampler
from sana_cli.sources import DIGIT_WORDS
from sana_cli.training import batches, optim, trainer
from sana_cli.weights import checkpoint, configs


def run(config: Config, **options: Any) -> TrainSummary:
    *_, summary = train(TrainOptions(config, **options))
    assert isinstance(summary, TrainSummary)
    return summary


def again(config: Config, *overrides: str) -> Config:
    """The same config with overrides, on the same dataset."""
    return small_config(config.data.dir.parent, *overrides)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = ("transformer/diffusion_pytorch_model.safetensors", "training/raw.safetensors", "training/optimizer.safetensors")
    return {f"{name}:{key}": tensor for name in files for key, tensor in load_file(folder / name).items()}


def assert_same(one: Path, two: Path) -> None:
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_loss_is_the_velocitys_squared_error(config: Config) -> None:
    dataset = Dataset(config.data.dir)
    batch = batches.training_batch(dataset, config.train, 0, 8)

    class Oracle(torch.nn.Module):
        def forward(self, x: torch.Tensor, states: torch.Tensor, timestep: torch.Tensor, **_: object) -> torch.Tensor:
            sigma = (timestep / 1000).view(-1, 1, 1, 1)
            return (x - batch.x_0) / sigma  # = noise - x_0 if and only if x_t and the signs are right

    losses = trainer.batch_loss(Oracle(), batch, config.model, 0.5, torch.device("cpu"), "fp32")
    assert losses.shape == (8,)
    assert float(losses.max()) < 1e-6


def test_a_foreseen_samples_loss_is_the_velocitys_down_to_the_floor(config: Config) -> None:
    """A guess that is off everywhere: its velocity, as a solver is told it, against noise - data."""
    batch = batches.training_batch(Dataset(config.data.dir), config.train, 0, 32)
    foresees = config.model.model_copy(update={"prediction_type": "sample"})
    off = torch.linspace(-1, 2, 16 * 16).view(1, 16, 16)

    class Guess(torch.nn.Module):
        def forward(self, *_: object, **__: object) -> torch.Tensor:
            return batch.x_0 + off

    losses = trainer.batch_loss(Guess(), batch, foresees, 0.5, torch.device("cpu"), "fp32")
    assert 0 < int((batch.sigma < 0.5).sum()) < 32
    for x_0, noise, sigma, loss in zip(batch.x_0, batch.noise, batch.sigma, losses, strict=True):
        x = (1 - sigma) * x_0 + sigma * noise
        wrong = flow.velocity_of(x_0 + off, x, float(sigma), "sample") - (noise - x_0)
        share = min(float(sigma) / 0.5, 1.0) ** 2
        assert float(loss) == pytest.approx(share * float(wrong.square().mean()), rel=1e-3)


def test_draws_depend_on_the_seed_and_the_samples_place_alone(config: Config) -> None:
    dataset, settings = Dataset(config.data.dir), config.train
    whole = batches.training_batch(dataset, settings, 10, 6)
    part = batches.training_batch(dataset, settings, 13, 3)
    assert torch.equal(whole.noise[3:], part.noise)
    assert torch.equal(whole.sigma[3:], part.sigma)
    assert torch.equal(whole.x_0[3:], part.x_0)
    other = batches.training_batch(dataset, settings.model_copy(update={"seed": 1}), 10, 6)
    assert not torch.equal(whole.noise, other.noise)


def test_draws_are_what_the_config_says(config: Config) -> None:
    dataset = Dataset(config.data.dir)
    settings = config.train.model_copy(update={"caption_dropout": 0.25, "flow_shift": 3.0, "logit_mean": 0.0})
    batch = batches.training_batch(dataset, settings, 0, 4000)
    assert float(batch.noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(batch.noise.std()) == pytest.approx(1, abs=0.01)
    assert float(batch.sigma.median()) == pytest.approx(0.75, abs=0.02)
    null = dataset.states([dataset.index["null_caption"]])[0]
    states, mask = batch.states[batch.caption_index], batch.mask[batch.caption_index]
    dropped = mask.sum(1) == len(null)
    assert len(batch.states) == 21  # each distinct caption once
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    row = int(dropped.nonzero()[0])
    assert torch.equal(states[row, : len(null)], null)  # with its own mask, not the caption's
    labels = dataset.labels()
    assert labels is not None
    bytes_of = {dataset.states([i])[0].float().numpy().tobytes(): text for i, text in enumerate(dataset.texts())}
    kept = [
        (bytes_of[states[i, : int(mask[i].sum())].float().numpy().tobytes()], int(labels[r]))
        for i, r in enumerate(batch.rows)
        if not dropped[i]
    ]
    assert all(text in (str(label), DIGIT_WORDS[label]) for text, label in kept)
    spelled = sum(len(text) > 1 for text, _ in kept) / len(kept)
    assert spelled == pytest.approx(0.5, abs=0.03)  # "4" and "four" come equally often


def test_any_run_of_images_sees_all_noise_levels() -> None:
    """Of n in a row, every tenth of the density gets n / 10, give or take two; each seed begins elsewhere."""
    for first, count in ((0, 64), (12345, 64), (10**9, 640)):
        drawn = batches.quantiles(first, count, seed=3)
        assert (drawn > 0).all()
        assert (drawn < 1).all()
        counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
        assert abs(counts - count / 10).max() <= 2
    assert np.array_equal(batches.quantiles(5, 3, 0), batches.quantiles(0, 8, 0)[5:])
    assert not np.isclose(batches.quantiles(0, 1, 0), batches.quantiles(0, 1, 1))


def test_schedules() -> None:
    settings = TrainConfig(steps=110, warmup_steps=10, schedule="cosine")
    factors = [optim.lr_factor(settings, step) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[-1] < 0.001
    linear = settings.model_copy(update={"schedule": "linear"})
    assert optim.lr_factor(linear, 60) == pytest.approx(0.5)
    assert optim.lr_factor(settings.model_copy(update={"schedule": "constant"}), 109) == 1
    assert [optim.ema_decay(settings, step) for step in (0, 8, 10**6)] == pytest.approx([0.1, 0.5, settings.ema_decay])


def stopped(config: Config, step: int, polls: int = 1, resume: str = "none") -> Interrupted:
    """Train until `step` is done, and ask it to stop `polls` times later that it asks whether to."""
    asked = -1

    def stop() -> int | None:
        nonlocal asked
        asked += asked >= 0
        return 15 if asked >= polls else None

    def go() -> None:
        nonlocal asked
        for found in train(TrainOptions(config, resume, stop)):
            if isinstance(found, TrainStep) and found.step == step:
                asked = 0

    with pytest.raises(Interrupted) as caught:
        go()
    assert caught.value.exit_code == 143
    return caught.value


TIMES = {"samples_per_second", "data_wait", "memory_bytes"}


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock says."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_resumed_at_any_step_is_bitwise_one_never_stopped(config: Config, accumulate: int) -> None:
    """Weights, EMA, optimizer and metrics; also where a stop falls between lines of metrics, or into a held-out loss."""

    def cut(name: str) -> Config:
        return again(
            config, f"run.dir={config.run.dir}-{name}", f"train.accumulate={accumulate}", "train.steps=12", "train.log_every=3",
            "train.save_every=12", "train.sample_every=12", "train.ema_decay=0.9", "model.dropout=0.1", "data.held_out_split=test",
            "train.held_out_every=4", "train.held_out_images=6",
        )  # fmt: skip

    embedded(cut("straight"))
    straight = run(cut("straight"))
    expected = lines(straight.run)
    assert [line["step"] for line in expected] == [3, 4, 6, 8, 9, 12]
    assert [line["step"] for line in expected if "held_out_loss" in line] == [4, 8, 12]
    for step in range(12):
        for polls in {1, accumulate}:  # the second: within a step, whose gradients so far are dropped
            there = cut(f"{step}-{polls}")
            message = str(stopped(there, step, polls))
            assert message.startswith(f"stopped after step {step}" + (", which is saved" if step else "; nothing was saved"))
            summary = run(there, resume="auto")
            assert (summary.first_step, summary.steps) == (step, 12)
            assert_same(summary.checkpoint, straight.checkpoint)
            assert lines(there.run.dir) == expected


@pytest.mark.parametrize("recomputed", [False, True])
def test_autocast_casts_a_parameter_once_a_step(config: Config, monkeypatch: pytest.MonkeyPatch, recomputed: bool) -> None:
    """However many micro-batches it has; and the gradient is theirs, each on its own, added up in float32."""
    monkeypatch.setattr("sana_cli.model.has_native_bf16", lambda _: True)
    dataset = Dataset(config.data.dir)
    settings = config.train.model_copy(update={"accumulate": 3, "activation_checkpointing": recomputed})
    made = config.model.model_copy(update={"sample_size": 16, "caption_channels": dataset.index["caption_dim"]})
    one, other = (trainer.Trainer(made, settings, trainer.Place(torch.device("cpu"), "bf16"), dataset, 12) for _ in range(2))
    weight = one.model.transformer_blocks[0].get_parameter("attn1.to_out.0.weight")
    casts = 0

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal casts
            casts += operation is torch.ops.aten._to_copy.default and args[0] is weight
            return operation(*args, **(kwargs or {}))

    with Casts():
        one._gradients(lambda: None)
    assert casts == 1
    for first in (0, 4, 8):
        batch = batches.training_batch(dataset, settings, first, 4)
        (trainer.batch_loss(other.model, batch, made, settings.sigma_floor, torch.device("cpu"), "bf16").sum() / 12).backward()
    one.close()
    other.close()
    expected = dict(other.model.named_parameters())
    for name, parameter in one.model.named_parameters():
        assert parameter.grad is not None
        assert expected[name].grad is not None
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-8), name


def test_what_a_stop_cut_short_is_made_up_for(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that was owed, and a grid that was being drawn."""
    there = again(
        config, "train.log_every=2", "train.sample_every=2", "train.save_every=4", "data.held_out_split=test", "train.held_out_every=2",
        "train.held_out_images=8", "sample.steps=3",
    )  # fmt: skip
    embedded(there)
    straight = run(there.model_copy(update={"run": there.run.model_copy(update={"dir": Path(f"{there.run.dir}-straight")})}))
    for polls in range(1, 9):  # step 2 is one micro-batch, a held-out loss of two, and a grid of three solver steps
        name = there.model_copy(update={"run": there.run.model_copy(update={"dir": Path(f"{there.run.dir}-{polls}")})})
        stopped(name, 1, polls)
        summary = run(name, resume="auto")
        assert lines(name.run.dir) == lines(straight.run), polls
        assert sorted(path.name for path in (name.run.dir / "samples").iterdir()) == [f"step-00000{n}.png" for n in (0, 2, 4)]
        assert_same(summary.checkpoint, straight.checkpoint)


def test_resume_rules(config: Config) -> None:
    with pytest.raises(SanaError, match="no checkpoint at"):
        run(config, resume=str(config.run.dir / "checkpoints" / "step-000002"))
    first = run(again(config, "train.steps=2"), resume="auto")  # starts where there is nothing
    assert first.first_step == 0
    with pytest.raises(SanaError, match=r"has checkpoints already, the newest step-000002\ncontinue it with --resume auto"):
        run(config)
    with pytest.raises(SanaError) as caught:
        run(again(config, "train.lr=0.5", "model.num_layers=2"), resume="auto")
    assert "model.num_layers: the run has 1, not 2" in str(caught.value)
    assert "train.lr: the run has 0.006, not 0.5" in str(caught.value)
    last = run(again(config, "train.save_every=1", "train.log_every=3", "sample.steps=1"), resume="auto")
    assert (last.first_step, last.steps) == (2, 4)
    assert run(config, resume="auto").first_step == 4  # finished: says so
    with pytest.raises(SanaError, match=r"later checkpoints than step-000003: step-000004\n.*another run"):
        run(again(config, "train.steps=9"), resume=str(config.run.dir / "checkpoints" / "step-000003"))
    other = again(config, f"data.dir={config.data.dir}-other", "train.steps=9")
    embedded(other, limit=30)
    with pytest.raises(SanaError, match="is not the dataset that the run was trained on"):
        run(other, resume="auto")


def test_damaged_checkpoints_are_passed_over_by_name(config: Config) -> None:
    run(again(config, "train.save_every=1", "train.keep=4"))
    folders = checkpoint.steps(config.run.dir)
    assert [folder.name for folder in folders] == [f"step-{n:06d}" for n in (1, 2, 3, 4)]
    (folders[3] / "manifest.json").unlink()
    raw = folders[2] / "training" / "raw.safetensors"
    content = bytearray(raw.read_bytes())
    content[-1] ^= 1
    raw.write_bytes(content)
    summary = run(again(config, "train.keep=1"), resume="auto")
    assert summary.first_step == 2
    assert "step-000004 lacks manifest.json" in summary.skipped[0]
    assert "raw.safetensors is damaged" in summary.skipped[1]
    assert list(checkpoint.verify(config.run.dir / "checkpoints" / "step-000004", hashes=True))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_before_the_weights_move(
    config: Config, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    honest, calls = trainer.batch_loss, 0

    def poisoned(model: torch.nn.Module, batch: batches.Batch, *rest: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        losses = honest(model, batch, *rest)
        if calls != 4:
            return losses
        if what == "gradient":
            losses.register_hook(lambda gradient: gradient * math.nan)
            return losses
        return losses * torch.tensor([1.0, math.nan, 1.0, 1.0])

    straight = run(
        again(config, "train.steps=3", "train.save_every=3", f"run.dir={config.run.dir}-straight", "train.schedule=constant")
    )
    monkeypatch.setattr(trainer, "batch_loss", poisoned)
    config = again(config, "train.save_every=4", "train.schedule=constant")
    with pytest.raises(SanaError) as caught:
        run(config)
    batch = batches.training_batch(Dataset(config.data.dir), config.train, 12, 4)
    ids = Dataset(config.data.dir).sample_ids(batch.rows)
    sigma = [f"{value:.3f}" for value in batch.sigma.tolist()]
    told = f"sigma {sigma[1]} to {sigma[1]}, samples {ids[1]}" if what == "loss" else f"samples {', '.join(ids)}"
    first, second, third, fourth = str(caught.value).splitlines()
    assert first == f"step 4: the {what} is not finite; weights are untouched"
    assert told in second
    assert third == f"step 3 is saved in {config.run.dir}/checkpoints/step-000003"
    assert "--set train.init_from=" in fourth
    assert_same(checkpoint.steps(config.run.dir)[-1], straight.checkpoint)  # weights are those of step 3, to the bit
    monkeypatch.setattr(trainer, "batch_loss", honest)
    assert run(config, resume="auto").first_step == 3


def test_no_checkpoint_with_numbers_that_are_not_finite(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = trainer.Trainer.weights

    def broken(self: trainer.Trainer) -> dict[str, torch.Tensor]:
        weights = {name: tensor.clone() for name, tensor in honest(self).items()}
        weights["proj_out.bias"][0] = math.inf
        return weights

    monkeypatch.setattr(trainer.Trainer, "weights", broken)
    with pytest.raises(SanaError, match=r"step 2: proj_out\.bias is not finite, so no checkpoint was written"):
        run(config)
    assert checkpoint.steps(config.run.dir) == []


def test_a_full_disk_leaves_the_last_checkpoint(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run(again(config, "train.steps=2", "train.keep=1"))
    from sana_cli.runtime import files

    honest = files.write_tensors

    def full(path: Path, *rest: Any) -> None:
        honest(path, *rest)
        if path.name == "optimizer.safetensors":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(SanaError, match=r"the disk is full: writing .*step-000004"):
        run(again(config, "train.keep=1"), resume="auto")
    folder, skipped = checkpoint.newest_step(config.run.dir, hashes=True)
    assert folder is not None
    assert (folder.name, skipped) == ("step-000002", [])


def test_config_and_dataset_must_agree(config: Config) -> None:
    for override, message in (
        ("data.image_size=24", "data.image_size: .* has 16x16, not 24x24"),
        ("model.in_channels=3", "model.in_channels: .* has 1, not 3"),
        ("model.caption_channels=2304", "model.caption_channels: .* has 128, not 2304"),
        ("text.encoder=google/gemma-2-2b-it", "text.encoder: .* has 'tiny', not 'google/gemma-2-2b-it'"),
    ):
        with pytest.raises(SanaError, match=f"{message}.*\nembed it again"):
            run(again(config, override))
    assert not config.run.dir.exists()


def test_ema_follows_the_weights(config: Config) -> None:
    run(again(config, "train.ema_decay=0.0"))
    found = tensors(config.run.dir / "checkpoints" / "step-000004")
    for name, tensor in found.items():
        if name.startswith("transformer/"):
            assert torch.equal(tensor, found[name.replace("transformer/diffusion_pytorch_model", "training/raw")])


def test_weight_decay_spares_biases_norms_and_tables(config: Config) -> None:
    from sana_cli.model import build

    model = build(config.model.model_copy(update={"sample_size": 16, "caption_channels": 8}))
    for kind in ("adamw", "muon"):
        made = optim.Optimizer(model, config.train.model_copy(update={"optimizer": kind}), torch.device("cpu"))
        groups = [{made.names[p] for p in group["params"]} for group in made.param_groups]
        assert [group["weight_decay"] for group in made.param_groups] == [0.05, 0.0, 0.05][: len(groups)]
        assert {n for n in made.names.values() if n.endswith(("bias", "scale_shift_table", "norm.weight"))} == groups[1]
        assert set().union(*groups) == {name for name, _ in model.named_parameters()}
        if kind == "muon":
            block = "transformer_blocks.0."
            parts = (
                "attn1.to_q",
                "attn1.to_k",
                "attn1.to_v",
                "attn1.to_out.0",
                "attn2.to_q",
                "attn2.to_k",
                "attn2.to_v",
                "attn2.to_out.0",
            )
            assert groups[2] == {f"{block}{part}.weight" for part in (*parts, "ff.conv_inverted", "ff.conv_point")}


def test_init_from_starts_with_the_weights_of_another_run(config: Config) -> None:
    first = run(config)
    second = again(
        config, f"run.dir={config.run.dir}-2", f"train.init_from={config.run.dir}", "train.lr=1e-12", "train.weight_decay=0"
    )
    *_, summary = train(TrainOptions(second))
    assert isinstance(summary, TrainSummary)
    old = load_file(first.checkpoint / "transformer" / configs.WEIGHTS)
    new = load_file(summary.checkpoint / "training" / "raw.safetensors")
    assert all(torch.allclose(old[name], new[name], atol=1e-9) for name in old)
    with pytest.raises(SanaError, match=r"is not the model of this config:\nmodel\.num_layers: it has 1, not 2"):
        run(again(config, f"run.dir={config.run.dir}-3", f"train.init_from={config.run.dir}", "model.num_layers=2"))


def test_steps_report_and_grids_are_drawn(config: Config) -> None:
    steps = [step for step in train(TrainOptions(config)) if isinstance(step, TrainStep)]
    assert [step.step for step in steps] == [0, 1, 2, 3, 4]
    assert [step.sampled is not None for step in steps] == [True, False, False, False, True]
    assert [step.saved is not None for step in steps] == [False, False, True, False, True]
    record = pictures.read_record(config.run.dir / "samples" / "step-000004.png")
    assert record["images"] == [[{"prompt": "4", "seed": 0}, {"prompt": "two", "seed": 1}]]
    assert sorted(path.name for path in config.run.dir.iterdir()) == [
        "checkpoints", "config.yaml", "metrics.jsonl", "report.html", "samples",
    ]  # fmt: skip
    assert sorted((config.run.dir / "checkpoints").iterdir()) == checkpoint.steps(config.run.dir)


def test_sampling_leaves_training_as_it_was(config: Config) -> None:
    run(again(config, "train.sample_every=1", f"run.dir={config.run.dir}-often"))
    run(config)
    assert_same(config.run.dir / "checkpoints" / "step-000004", Path(f"{config.run.dir}-often") / "checkpoints" / "step-000004")


def test_a_small_model_learns_what_the_prompts_mean(tmp_path: Path) -> None:
    """Zeros and ones, a minute's work at most: what is drawn for a word is nearer to that word's mean image."""
    config = small_config(
        tmp_path, "train.steps=400", "train.batch_size=32", "train.lr=8e-3", "train.warmup_steps=20", "train.ema_decay=0.97",
        "train.save_every=400", "train.sample_every=400", "model.num_attention_heads=8", "model.num_layers=2", "sample.steps=8",
        "model.num_cross_attention_heads=8", "model.patch_size=4",
    )  # fmt: skip
    embedded(config, limit=400)
    summary = run(config)
    dataset = Dataset(config.data.dir)
    labels = dataset.labels()
    assert labels is not None
    means = torch.stack([dataset.images(np.flatnonzero(labels.numpy() == digit)).mean(0) for digit in range(10)])
    model = checkpoint.load_transformer(summary.checkpoint)
    texts, null = dataset.texts(), dataset.states([dataset.index["null_caption"]])[0]
    right = 0
    prompts = [(0, "0"), (0, "zero"), (1, "1"), (1, "one")] * 8
    states = [dataset.states([texts.index(word)])[0] for _, word in prompts]
    images = sampler.final_images(
        sampler.sample_images(
            model,
            states,
            [null] * 32,
            list(range(32)),
            dataset.image_shape,
            config.sample.model_copy(update={"steps": 8}),
            "fp32",
        )
    )
    assert float(images.mean()) == pytest.approx(float(dataset.images(np.arange(400)).mean()), abs=0.25)
    for (digit, _), image in zip(prompts, images, strict=True):
        distance = [float((image - means[d]).square().mean()) for d in (0, 1)]
        right += int(distance[digit] < distance[1 - digit])
    assert right >= 28


def test_a_failing_sampling_step_warns_and_training_goes_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    plain = again(config, f"run.dir={config.run.dir}-plain")
    *_, undisturbed = train(TrainOptions(plain))
    monkeypatch.setattr("sana_cli.sampling.sampler.sample_images", fails)
    *steps, summary = train(TrainOptions(config))
    assert isinstance(summary, TrainSummary)
    assert (summary.steps, summary.grid) == (4, None)
    warnings = [(step.step, step.warning) for step in steps if isinstance(step, TrainStep) and step.warning]
    assert warnings == [(step, f"no samples at step {step}: out of memory") for step in (0, 4)]
    assert summary.loss == undisturbed.loss


def test_out_of_memory_names_what_to_change(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "batch_loss", full)
    with pytest.raises(SanaError, match=r"step 1: out of memory on cpu") as caught:
        list(train(TrainOptions(config)))
    assert all(
        f"train.{key}" in str(caught.value) for key in ("batch_size", "accumulate", "activation_checkpointing", "precision")
    )


def test_given_weights_draw_no_random_model_first(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a resume nor init_from: it would take seconds of every process, to be overwritten."""
    first = list(train(TrainOptions(config)))[-1]

    def drawn(*_: object) -> None:
        raise AssertionError("a random model was drawn")

    monkeypatch.setattr("sana_cli.model.initialize", drawn)
    longer = small_config(tmp_path, "train.steps=6")
    assert list(train(TrainOptions(longer, resume="auto")))[-1].steps == 6
    again = small_config(tmp_path, f"train.init_from={first.checkpoint}", f"run.dir={tmp_path / 'again'}", "train.lr=1e-12")
    done = list(train(TrainOptions(again)))[-1]
    found = files.read_tensors(done.checkpoint / checkpoint.RAW_WEIGHTS)
    given = files.read_tensors(first.checkpoint / "transformer" / configs.WEIGHTS)
    assert all(torch.allclose(found[name], given[name], atol=1e-6) for name in given), "they are the weights that were given"
    with pytest.raises(AssertionError, match="a random model was drawn"):
        list(train(TrainOptions(small_config(tmp_path, f"run.dir={tmp_path / 'new'}"))))


def test_a_longer_run_keeps_the_warm_up_that_it_began_with(tmp_path: Path) -> None:
    """The default follows from the steps; a run that goes on with more of them must not warm up a second time."""
    short = small_config(tmp_path, "train.steps=20", "train.warmup_steps=null", "train.schedule=constant", "train.save_every=20")
    embedded(short)
    *_, done = train(TrainOptions(short))
    saved = files.read_json(done.checkpoint / checkpoint.STATE)["config"]["train"]
    assert saved["warmup_steps"] == 2
    longer = small_config(
        tmp_path, "train.steps=1000", "train.warmup_steps=null", "train.schedule=constant", "train.save_every=1000"
    )
    steps = train(TrainOptions(longer, resume="auto"))
    rates = []
    for step in steps:
        if isinstance(step, TrainStep) and step.step > 20:
            rates.append(step.lr)
        if len(rates) == 3:
            break
    steps.close()
    assert rates == [longer.train.lr] * 3
    with pytest.raises(SanaError, match=r"train\.warmup_steps: the run has 2, not 5"):
        list(
            train(
                TrainOptions(
                    small_config(tmp_path, *["train.steps=30", "train.warmup_steps=5", "train.schedule=constant"]), "auto"
                )
            )
        )


def test_a_checkpoint_knows_its_words(config: Config, tmp_path: Path) -> None:
    from sana_cli.commands.sample import SampleOptions, SampleSummary, sample

    *_, done = train(TrainOptions(config))
    record = checkpoint.read_record(done.checkpoint)
    assert record["words"] == sorted(["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", *DIGIT_WORDS])

    def notes(*prompts: str, **options: object) -> tuple[str, ...]:
        options = {"out": tmp_path / "x.png", "device": "cpu", "steps": 1} | options
        *_, summary = sample(SampleOptions(prompts, done.checkpoint, **options))  # type: ignore[arg-type]
        assert isinstance(summary, SampleSummary)
        return summary.notes

    assert notes("4 TWO", negative_prompt="six") == ()
    assert notes("4 --w 32", "forty", negative_prompt="ugly") == (
        "words that this checkpoint was never trained on: - w forty ugly",
    )
    (note,) = notes(" ".join(["4" * 400]))
    assert "1 of the prompts are longer than text.max_length, 300 tokens" in note
    unseen = small_config(tmp_path, 'sample.prompts=["4 zebra"]', f"run.dir={tmp_path / 'unseen'}")
    start = next(step for step in train(TrainOptions(unseen)) if isinstance(step, TrainStart))
    assert "sample.prompts: words that no caption of the dataset has: zebra" in start.notes
