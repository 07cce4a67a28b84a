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

from sana_cli import checkpoint, draw, formats, store
from sana_cli.commands import train as training
from sana_cli.commands.train import TrainOptions, TrainStep, TrainSummary, train
from sana_cli.config import Config, TrainConfig
from sana_cli.errors import Interrupted, SanaError


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


def gradients(config: Config) -> tuple[dict[str, torch.Tensor], float]:
    """The gradients of the first step, taken before the optimizer moves."""
    state = training._Run(TrainOptions(config), store.Dataset(config.data.dir))
    state.start()
    found: dict[str, torch.Tensor] = {}
    state.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in state.model.named_parameters() if p.grad is not None})
    )
    loss, _, _ = state.advance(lambda: None)
    return found, loss


def test_accumulation_equals_one_batch(config: Config) -> None:
    whole, loss = gradients(again(config, "train.batch_size=12", "train.grad_clip=null"))
    for size, count in ((6, 2), (3, 4), (1, 12)):
        parts, other = gradients(again(config, f"train.batch_size={size}", f"train.accumulate={count}", "train.grad_clip=null"))
        assert other == pytest.approx(loss, rel=1e-6)
        error = math.sqrt(sum(float((parts[n] - g).square().sum()) for n, g in whole.items()))
        assert error / math.sqrt(sum(float(g.square().sum()) for g in whole.values())) < 1e-6


def test_loss_is_the_velocitys_squared_error(config: Config) -> None:
    dataset = store.Dataset(config.data.dir)
    batch = training.make_batch(dataset, config.train, 0, 8)

    class Oracle(torch.nn.Module):
        def forward(self, x: torch.Tensor, states: torch.Tensor, timestep: torch.Tensor, **_: object) -> torch.Tensor:
            sigma = (timestep / 1000).view(-1, 1, 1, 1)
            return (x - batch.x_0) / sigma  # = noise - x_0 if and only if x_t and the signs are right

    losses = training.batch_loss(Oracle(), batch, 1.0, torch.device("cpu"), "fp32")
    assert losses.shape == (8,)
    assert float(losses.max()) < 1e-6


def test_draws_depend_on_the_seed_and_the_samples_place_alone(config: Config) -> None:
    dataset, settings = store.Dataset(config.data.dir), config.train
    whole = training.make_batch(dataset, settings, 10, 6)
    part = training.make_batch(dataset, settings, 13, 3)
    assert torch.equal(whole.noise[3:], part.noise)
    assert torch.equal(whole.sigma[3:], part.sigma)
    assert torch.equal(whole.x_0[3:], part.x_0)
    other = training.make_batch(dataset, settings.model_copy(update={"seed": 1}), 10, 6)
    assert not torch.equal(whole.noise, other.noise)


def test_draws_are_what_the_config_says(config: Config) -> None:
    dataset = store.Dataset(config.data.dir)
    settings = config.train.model_copy(update={"caption_dropout": 0.25, "flow_shift": 3.0, "logit_mean": 0.0})
    batch = training.make_batch(dataset, settings, 0, 4000)
    assert float(batch.noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(batch.noise.std()) == pytest.approx(1, abs=0.01)
    assert float(batch.sigma.median()) == pytest.approx(0.75, abs=0.02)
    null = dataset.states([dataset.index["null_caption"]])[0]
    dropped = batch.mask.sum(1) == len(null)
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    row = int(dropped.nonzero()[0])
    assert torch.equal(batch.states[row, : len(null)], null)  # with its own mask, not the caption's
    labels = dataset.labels()
    assert labels is not None
    lengths = {text: len(dataset.states([i])[0]) for i, text in enumerate(dataset.texts())}
    kept = [(int(batch.mask[i].sum()), int(labels[r])) for i, r in enumerate(batch.rows) if not dropped[i]]
    words = [text for text in dataset.texts() if len(text) > 1]
    assert {length for length, _ in kept} == {lengths[w] for w in words} | {2}
    spelled = sum(length > 2 for length, _ in kept) / len(kept)
    assert spelled == pytest.approx(0.5, abs=0.03)  # "4" and "four" come equally often


def test_schedules() -> None:
    settings = TrainConfig(steps=110, warmup_steps=10, schedule="cosine")
    factors = [training.lr_factor(settings, step) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[-1] < 0.001
    linear = settings.model_copy(update={"schedule": "linear"})
    assert training.lr_factor(linear, 60) == pytest.approx(0.5)
    assert training.lr_factor(settings.model_copy(update={"schedule": "constant"}), 109) == 1
    assert [training.ema_decay(settings, step) for step in (0, 8, 10**6)] == pytest.approx([0.1, 0.5, settings.ema_decay])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_is_bitwise_one_never_stopped(config: Config, accumulate: int) -> None:
    common = (f"train.accumulate={accumulate}", "train.keep=9", "train.save_every=1", "model.dropout=0.1", "train.ema_decay=0.9")
    straight = again(config, *common, f"run.dir={config.run.dir}-straight")
    run(straight)
    lines = (straight.run.dir / "metrics.jsonl").read_text().splitlines()
    for stop in range(1, 4):
        place = f"run.dir={config.run.dir}-{stop}"
        count = 0

        def after(stop: int = stop) -> int | None:
            nonlocal count
            count += 1
            return 15 if count == stop * accumulate + 1 else None

        with pytest.raises(Interrupted, match=f"stopped after step {stop}") as caught:
            run(again(config, *common, place), stop=after)
        assert caught.value.exit_code == 143
        summary = run(again(config, *common, place), resume="auto")
        assert (summary.first_step, summary.steps) == (stop, 4)
        assert_same(summary.checkpoint, straight.run.dir / "checkpoints" / "step-000004")
        resumed = [json.loads(line) for line in (summary.run / "metrics.jsonl").read_text().splitlines()]
        for found, line in zip(resumed, lines, strict=True):
            expected = json.loads(line)
            assert [found[key] for key in ("step", "loss", "lr", "grad_norm")] == [
                expected[key] for key in ("step", "loss", "lr", "grad_norm")
            ]


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
    assert "train.lr: the run has 0.008, not 0.5" in str(caught.value)
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


def test_a_number_that_is_not_finite_stops_before_the_weights_move(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = training.batch_loss, 0

    def poisoned(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return honest(*arguments) * (math.nan if calls == 4 else 1)

    monkeypatch.setattr(training, "batch_loss", poisoned)
    config = again(config, "train.save_every=1", "train.keep=9")
    with pytest.raises(
        SanaError, match=r"step 4: the loss is not finite; weights are untouched\nsigma 0\.\d+ to 0\.\d+, samples train-000"
    ):
        run(config)
    assert checkpoint.steps(config.run.dir)[-1].name == "step-000003"
    monkeypatch.setattr(training, "batch_loss", honest)
    assert run(config, resume="auto").first_step == 3


def test_no_checkpoint_with_numbers_that_are_not_finite(config: Config) -> None:
    state = training._Run(TrainOptions(config), store.Dataset(config.data.dir))
    state.start()
    with torch.no_grad():
        state.model.proj_out.bias[0] = math.inf
    with pytest.raises(SanaError, match=r"proj_out\.bias is not finite, so no checkpoint was written"):
        state.save()
    assert checkpoint.steps(config.run.dir) == []


def test_a_full_disk_leaves_the_last_checkpoint(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run(again(config, "train.steps=2", "train.keep=1"))
    from sana_cli import files

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
    state = training._Run(TrainOptions(config), store.Dataset(config.data.dir))
    spared = {state.names[p] for p in state.optimizer.param_groups[1]["params"]}
    assert {n for n in state.names.values() if n.endswith(("bias", "scale_shift_table", "norm.weight"))} == spared


def test_init_from_starts_with_the_weights_of_another_run(config: Config) -> None:
    first = run(config)
    second = again(
        config, f"run.dir={config.run.dir}-2", f"train.init_from={config.run.dir}", "train.lr=1e-12", "train.weight_decay=0"
    )
    *_, summary = train(TrainOptions(second))
    assert isinstance(summary, TrainSummary)
    old = load_file(first.checkpoint / "transformer" / formats.WEIGHTS)
    new = load_file(summary.checkpoint / "training" / "raw.safetensors")
    assert all(torch.allclose(old[name], new[name], atol=1e-9) for name in old)
    with pytest.raises(SanaError, match=r"is not the model of this config:\nmodel\.num_layers: it has 1, not 2"):
        run(again(config, f"run.dir={config.run.dir}-3", f"train.init_from={config.run.dir}", "model.num_layers=2"))


def test_steps_report_and_grids_are_drawn(config: Config) -> None:
    steps = [step for step in train(TrainOptions(config)) if isinstance(step, TrainStep)]
    assert [step.step for step in steps] == [0, 1, 2, 3, 4]
    assert [step.sampled is not None for step in steps] == [True, False, False, False, True]
    assert [step.saved is not None for step in steps] == [False, False, True, False, True]
    record = draw.read_record(config.run.dir / "samples" / "step-000004.png")
    assert record["images"] == [[{"prompt": "4", "seed": 0}, {"prompt": "two", "seed": 1}]]
    assert sorted(path.name for path in config.run.dir.iterdir()) == ["checkpoints", "config.yaml", "metrics.jsonl", "samples"]
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
    torch.set_num_threads(2)
    summary = run(config)
    dataset = store.Dataset(config.data.dir)
    labels = dataset.labels()
    assert labels is not None
    means = torch.stack([dataset.images(np.flatnonzero(labels.numpy() == digit)).mean(0) for digit in range(10)])
    model = checkpoint.load_transformer(summary.checkpoint)
    texts, null = dataset.texts(), dataset.states([dataset.index["null_caption"]])[0]
    right = 0
    prompts = [(0, "0"), (0, "zero"), (1, "1"), (1, "one")] * 8
    states = [dataset.states([texts.index(word)])[0] for _, word in prompts]
    images = draw.final_images(
        draw.draw(
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
    monkeypatch.setattr("sana_cli.draw.draw", fails)
    *steps, summary = train(TrainOptions(config))
    assert isinstance(summary, TrainSummary)
    assert (summary.steps, summary.grid) == (4, None)
    warnings = [(step.step, step.warning) for step in steps if step.warning]
    assert warnings == [(step, f"no samples at step {step}: out of memory") for step in (0, 4)]
    assert summary.loss == undisturbed.loss


def test_out_of_memory_names_what_to_change(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "batch_loss", full)
    with pytest.raises(
        SanaError, match=r"step 1: out of memory on cpu.*\n.*train\.batch_size.*train\.accumulate.*train\.precision"
    ):
        list(train(TrainOptions(config)))
