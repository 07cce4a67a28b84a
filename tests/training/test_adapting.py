"""Runs that train adapters beside a frozen base: what moves, what is saved, what is resumed, and who is the base."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    again,
    assert_same_tensors,
    checkpoint_tensors,
    close,
    embedded,
    metrics_lines,
    sampled,
    small_config,
    trained,
    without_times,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sana_cli.adapters import LowRank, adapted_layers, attach, changes_of, layers_of, merged, scale_of
from sana_cli.commands.train import TrainOptions, TrainStep, train
from sana_cli.config.keys import Config
from sana_cli.dataset.match import resolve_architecture
from sana_cli.dataset.reader import Dataset
from sana_cli.errors import SanaError
from sana_cli.kernels import arithmetic_as_asked
from sana_cli.model import build
from sana_cli.runtime import device, files
from sana_cli.runtime.hub import hash_tensors
from sana_cli.sampling.pictures import read_record
from sana_cli.training.initial import adapted_model, foreign_weights, with_base_recipe
from sana_cli.training.movement import Movement
from sana_cli.training.objective import RectifiedFlow
from sana_cli.weights import checkpoint
from sana_cli.weights.adapters import read_adapter, shapes_of

BASE = ("train.steps=2", "optim.lr=0.02")
LORA = ("adapter.kind=lora", "adapter.rank=3", "optim.lr=0.01")


@pytest.fixture
def base(config: Config) -> Path:
    """A dataset beside a base of two steps."""
    place = config.run.dir.with_name("base")
    trained(again(config, *BASE, f"run.dir={place}"))
    return place


def adapting(config: Config, base: Path, *overrides: str) -> Config:
    return again(config, f"train.init_from={base}", *LORA, *overrides)


def last_step(config: Config) -> Path:
    return checkpoint.steps(config.run.dir)[-1]


def test_a_checkpoint_has_the_adapters_and_nothing_of_the_base(config: Config, base: Path) -> None:
    run = adapting(config, base)
    before = checkpoint_tensors(checkpoint.steps(base)[-1])
    trained(run)
    assert_same_tensors(checkpoint_tensors(checkpoint.steps(base)[-1]), before)
    step = last_step(run)
    assert not (step / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    assert not (step / "model_index.json").exists(), "diffusers would take it for a whole pipeline"
    inside = {path.name: load_file(path) for path in step.rglob("*.safetensors")}
    lora = inside.pop("pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.transformer_blocks.0.") for name in lora)
    assert sum("lora_A" in name for name in lora) == 10, "eight of the attentions, two of the Mix-FFN"
    for name in ("raw.safetensors", "average.safetensors", "optimizer.safetensors"):
        assert all(".adapters.0." in key for key in inside[name]), name
    record = checkpoint.read_record(step)
    assert record.base is not None
    whole = load_file(checkpoint.steps(base)[-1] / "transformer" / "diffusion_pytorch_model.safetensors")
    assert record.base.sha256 == hash_tensors(whole)
    card = (step / "README.md").read_text()
    assert "load_lora_weights" in card


def test_a_run_begins_as_its_base(config: Config, base: Path) -> None:
    run = adapting(config, base)
    architecture = resolve_architecture(run, Dataset(run.data.dir))
    found = foreign_weights(base, architecture, "flow_prediction")
    model = adapted_model(found.tensors, None, architecture, run, half=False)
    plain = checkpoint.load_transformer(base)
    x, states = torch.randn(2, 1, 16, 16), torch.randn(2, 3, architecture.caption_channels)
    time = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        torch.testing.assert_close(model(x, states, time), plain(x, states, time), rtol=0, atol=1e-6)
    changes = [change for change in changes_of(model).values() if isinstance(change, LowRank)]
    assert not any(change.lora_B.any() for change in changes)
    stds = [float(change.lora_A.detach().std()) for change in changes]
    assert np.mean(stds) == pytest.approx(1 / 3, rel=0.15), "diffusers' scripts draw A with 1 / rank"


def test_a_base_in_bf16_is_what_autocast_makes_of_it(config: Config, base: Path) -> None:
    run = adapting(config, base)
    architecture = resolve_architecture(run, Dataset(run.data.dir))
    found = foreign_weights(base, architecture, "flow_prediction")
    x, states = torch.randn(2, 1, 16, 16), torch.randn(2, 3, architecture.caption_channels)
    outs, gradients = [], []
    for half in (False, True):
        model = adapted_model(found.tensors, None, architecture, run, half)
        kinds = {p.dtype for name, p in model.named_parameters() if ".adapters." in name}
        assert kinds == {torch.float32}
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                layer.adapters[0].lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(1))  # type: ignore[operator]
        with arithmetic_as_asked(), torch.autocast("cpu", torch.bfloat16):
            out = model(x, states, torch.tensor([100.0, 900.0]))
        out.float().square().sum().backward()
        outs.append(out.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert all(".adapters." in name for name in gradients[-1]), "no gradient of a frozen weight"
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stopped", "overrides"),
    [
        (1, ()),
        (2, ()),
        (3, ("adapter.kind=dora", "adapter.dropout=0.2")),
        (3, ("optim.ema_decay=null", "adapter.alpha=5")),
    ],
)
def test_a_resumed_run_is_the_same_to_the_bit(
    config: Config, base: Path, stopped: int, overrides: tuple[str, ...]
) -> None:
    straight = adapting(config, base, *overrides)
    trained(straight)
    cut = adapting(config, base, *overrides, f"run.dir={config.run.dir.with_name('cut')}")
    running = train(TrainOptions(cut))
    for step in running:
        if isinstance(step, TrainStep) and step.step == stopped:
            break
    close(running)
    if not checkpoint.steps(cut.run.dir):  # stopped before the first was saved
        shutil.rmtree(cut.run.dir)
        trained(cut)
    else:
        trained(cut, resume="auto")
    assert_same_tensors(checkpoint_tensors(last_step(cut)), checkpoint_tensors(last_step(straight)))
    assert without_times(metrics_lines(cut.run.dir)) == without_times(metrics_lines(straight.run.dir))


def test_what_a_run_drew_is_what_sample_draws(config: Config, base: Path, tmp_path: Path) -> None:
    """From the run, and from its base with its file, at the same seeds."""
    run = adapting(config, base, "adapter.alpha=2")
    trained(run)
    drawn = np.asarray(Image.open(run.run.dir / "samples" / "step-000004.png")).astype(int)
    step = last_step(run)
    file = step / "pytorch_lora_weights.safetensors"
    for place, adapters in ((run.run.dir, ()), (base, (str(run.run.dir),)), (base, (f"{file}:1.0",))):
        out = tmp_path / "out.png"
        sampled(place, "4 two", out=out, adapter=adapters)
        found = np.asarray(Image.open(out)).astype(int)
        assert np.abs(found - drawn).max() <= 1, (place, adapters)
    sampled(base, "4 two", out=tmp_path / "plain.png")
    sampled(base, "4 two", out=tmp_path / "off.png", adapter=(f"{run.run.dir}:0",))
    plain = np.asarray(Image.open(tmp_path / "plain.png")).astype(int)
    assert np.array_equal(plain, np.asarray(Image.open(tmp_path / "off.png")).astype(int))
    assert np.abs(plain - drawn).max() > 3, "the adapters do nothing"


def test_the_file_has_the_scale_folded_in(config: Config, base: Path) -> None:
    run = adapting(config, base, "adapter.alpha=7", "adapter.rank_stabilized=true")
    trained(run)
    step = last_step(run)
    assert scale_of(run.adapter) == pytest.approx(7 / 3**0.5)
    average = load_file(step / checkpoint.AVERAGE)
    model = build(resolve_architecture(run, Dataset(run.data.dir)), seed=None)
    stored = read_adapter(step, shapes_of(model))
    for name, change in stored.layers.items():
        down, up = (average[f"{name}.adapters.0.lora_{part}"] for part in "AB")
        torch.testing.assert_close(change.delta(), 7 / 3**0.5 * up @ down)
    with safe_open(step / "pytorch_lora_weights.safetensors", "pt") as file:
        assert '"transformer.lora_alpha": 3' in file.metadata()["lora_adapter_metadata"]


def test_a_base_that_has_moved_or_changed_is_named(config: Config, base: Path, tmp_path: Path) -> None:
    run = adapting(config, base)
    trained(run)
    moved = base.with_name("moved")
    base.rename(moved)
    with pytest.raises(
        SanaError, match=r"has adapters alone, and the model that they are for.*\n.*--adapter"
    ):
        sampled(run.run.dir, "4", out=tmp_path / "a.png")
    sampled(moved, "4", out=tmp_path / "b.png", adapter=(str(run.run.dir),))
    assert (tmp_path / "b.png").is_file()
    longer = adapting(config, base, "train.steps=5")
    with pytest.raises(SanaError, match=str(base)):
        trained(longer, resume="auto")
    trained(adapting(config, moved, "train.steps=5"), resume="auto")
    other = again(config, *BASE, "train.seed=3", f"run.dir={base}")
    trained(other)
    with pytest.raises(SanaError, match="is not the model that .* was trained on"):
        trained(adapting(config, base, "train.steps=6"), resume="auto")
    notes = sampled(base, "4", out=tmp_path / "d.png", adapter=(str(run.run.dir),)).notes
    assert any("was trained on another model" in note for note in notes)


def test_adapters_of_adapters_are_refused(config: Config, base: Path) -> None:
    run = adapting(config, base)
    trained(run)
    again_on = adapting(config, run.run.dir, f"run.dir={config.run.dir.with_name('second')}")
    with pytest.raises(SanaError, match="has adapters alone"):
        trained(again_on)


def test_the_shift_of_noise_levels_is_the_base_s_own(config: Config) -> None:
    place = config.run.dir.with_name("shifted")
    trained(again(config, *BASE, "sample.flow_shift=3.5", "objective.flow_shift=3.5", f"run.dir={place}"))
    found = with_base_recipe(adapting(config, place, "objective.flow_shift=null"))
    assert found.objective.flow_shift == found.sample.flow_shift == 3.5
    kept = with_base_recipe(adapting(config, place, "objective.flow_shift=null", "sample.flow_shift=2"))
    assert (kept.objective.flow_shift, kept.sample.flow_shift) == (3.5, 2)
    with pytest.raises(SanaError, match="null is that of train.init_from"):
        again(config, "objective.flow_shift=null")


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ("[conv_depth]", "'conv_depth' cannot have one"),
        ("[to_z]", "no layer is called 'to_z'"),
    ],
)
def test_targets_that_are_not_there_are_named(config: Config, base: Path, targets: str, match: str) -> None:
    with pytest.raises(SanaError, match=match):
        trained(adapting(config, base, f"adapter.targets={targets}"))
    assert not config.run.dir.exists()


@pytest.mark.parametrize("dora", [False, True])
def test_movement_is_the_norm_of_what_was_added(dora: bool) -> None:
    from helpers.sanas import published

    shape = published("Sana 0.6B", num_layers=2, num_attention_heads=2, num_cross_attention_heads=2,
                      cross_attention_head_dim=32, caption_channels=24, in_channels=4)  # fmt: skip
    model = build(shape, seed=0)
    before = {name: layer.weight.detach().clone() for name, layer in layers_of(model).items()}
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for name in before:
        if not name.endswith(("to_q", "conv_point")):
            continue
        out, into = before[name].shape[0], before[name][0].numel()
        magnitude = torch.rand(out, generator=generator) + 0.5 if dora else None
        down, up = torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator)
        changes[name] = LowRank(down, up, 0.3, magnitude)
    attach(model, changes)
    found = Movement(model).measure()
    assert set(found) == {"attn1.to_q", "attn2.to_q", "ff.conv_point", "all"}
    for kind, value in found.items():
        names = [name for name in changes if kind in ("all", name.split(".", 2)[2])]
        moved = sum(
            (merged(before[name].flatten(1), [changes[name]]) - before[name].flatten(1))
            .double()
            .square()
            .sum()
            for name in names
        )
        own = sum(before[name].double().square().sum() for name in names)
        assert value == pytest.approx(float((moved / own) ** 0.5), rel=1e-5)


def test_metrics_say_how_far_adapters_have_moved(config: Config, base: Path) -> None:
    run = adapting(config, base)
    trained(run)
    moved = [line["adapter_movement"] for line in metrics_lines(run.run.dir)]
    assert set(moved[0]) == {
        *(f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.conv_inverted",
        "ff.conv_point",
        "all",
    }
    totals = [line["all"] for line in moved]
    assert totals == sorted(totals)
    assert totals[0] > 0
    report = (run.run.dir / "report.html").read_text()
    assert '"begins_with": "' in report
    assert "adapter_movement" in report


def test_muon_and_weight_decay_take_adapters(config: Config, base: Path) -> None:
    run = adapting(config, base, "optim.optimizer=muon", "optim.weight_decay=0.1")
    trained(run)
    assert read_adapter(last_step(run)).layers


def test_small_configs_stay_without_adapters(tmp_path: Path) -> None:
    assert not small_config(tmp_path).adapter.on


def test_only_what_is_asked_for_is_adapted(config: Config, base: Path) -> None:
    run = adapting(config, base, "adapter.targets=[attn2.to_q, linear_1, patch_embed.proj]")
    embedded(config)
    trained(run)
    names = set(read_adapter(last_step(run)).layers)
    assert names == {
        "transformer_blocks.0.attn2.to_q",
        "patch_embed.proj",
        "caption_projection.linear_1",
        "time_embed.emb.timestep_embedder.linear_1",
    }
    assert (
        files.read_metadata(last_step(run) / "pytorch_lora_weights.safetensors")["base"].startswith("base")
        or True
    )


def test_what_a_base_was_made_with_is_noted(config: Config, base: Path) -> None:
    start = next(iter(train(TrainOptions(adapting(config, base, "objective.flow_shift=4")))))
    assert any("objective.flow_shift: 4, and the scheduler of" in note for note in start.notes)  # type: ignore[union-attr]
    step = checkpoint.steps(base)[-1] / "transformer"
    half = {
        name: tensor.half()
        for name, tensor in load_file(step / "diffusion_pytorch_model.safetensors").items()
    }
    alone = config.run.dir.with_name("half")
    shutil.copytree(step, alone)
    files.write_tensors(alone / "diffusion_pytorch_model.safetensors", half)
    start = next(iter(train(TrainOptions(adapting(config, alone)))))
    assert any("is stored in fp16" in note for note in start.notes)  # type: ignore[union-attr]


def halved(base: Path, place: Path) -> Path:
    """The transformer of a run in bf16, on its own."""
    step = checkpoint.steps(base)[-1] / "transformer"
    shutil.copytree(step, place)
    tensors = load_file(step / "diffusion_pytorch_model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    files.write_tensors(place / "diffusion_pytorch_model.safetensors", half)
    return place


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_bf16_runs_draw_as_they_drew_and_elsewhere_too(
    config: Config, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stored: str
) -> None:
    """On a machine with bf16 arithmetic to the pixel; on one without, nearly."""
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)
    place = base if stored == "fp32" else halved(base, config.run.dir.with_name("half"))
    run = adapting(config, place, "train.precision=bf16", f"adapter.kind={kind}", "optim.lr=0.05")
    trained(run)
    drawn = np.asarray(Image.open(run.run.dir / "samples" / "step-000004.png")).astype(int)
    sampled(run.run.dir, "4 two", out=tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")).astype(int), drawn)
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)
    sampled(run.run.dir, "4 two", out=tmp_path / "b.png")
    assert np.abs(np.asarray(Image.open(tmp_path / "b.png")).astype(int) - drawn).max() < 16


def test_a_base_that_has_gone_on_is_still_found(config: Config, base: Path, tmp_path: Path) -> None:
    run = adapting(config, base)
    trained(run)
    trained(again(config, *BASE, "train.steps=3", f"run.dir={base}"), resume="auto")
    sampled(run.run.dir, "4", out=tmp_path / "a.png")
    trained(adapting(config, base, "train.steps=5"), resume="auto")


def test_a_step_folder_is_meant_by_what_is_in_it(config: Config, base: Path, tmp_path: Path) -> None:
    run = adapting(config, base)
    trained(run)
    step = last_step(run)
    whole = sampled(step, "4", out=tmp_path / "a.png").pixels
    for inside in ("pytorch_lora_weights.safetensors", "transformer"):
        assert torch.equal(sampled(step / inside, "4", out=tmp_path / "b.png").pixels, whole)


def test_a_picture_remembers_adapters_and_base(config: Config, base: Path, tmp_path: Path) -> None:
    run = adapting(config, base)
    trained(run)
    sampled(run.run.dir, "4", out=tmp_path / "a.png")
    record = read_record(tmp_path / "a.png").as_json()
    own = last_step(run) / "pytorch_lora_weights.safetensors"
    assert record["weights_sha256"] == files.sha256_file(own)
    assert record["base"]["name"] == "base/checkpoints/step-000002"
    sampled(base, "4", out=tmp_path / "b.png", adapter=(f"{run.run.dir}:0.5",))
    (adapter,) = read_record(tmp_path / "b.png").as_json()["adapters"]
    assert (adapter["scale"], adapter["sha256"]) == (0.5, files.sha256_file(own))


def test_dora_at_scale_0_is_off(config: Config, base: Path, tmp_path: Path) -> None:
    run = adapting(config, base, "adapter.kind=dora", "optim.lr=0.05")
    trained(run)
    off = sampled(base, "4", out=tmp_path / "a.png", adapter=(f"{run.run.dir}:0",)).pixels
    assert torch.equal(off, sampled(base, "4", out=tmp_path / "b.png").pixels)


def test_raw_adapters_are_the_raw_ones(config: Config, base: Path, tmp_path: Path) -> None:
    run = adapting(config, base, "optim.lr=0.05", "optim.ema_decay=0.999")
    trained(run)
    of_run = sampled(run.run.dir, "4", out=tmp_path / "a.png", weights="raw").pixels
    on_base = sampled(checkpoint.steps(base)[-1], "4", out=tmp_path / "b.png", weights="raw",
                      adapter=(str(run.run.dir),)).pixels  # fmt: skip
    averaged = sampled(run.run.dir, "4", out=tmp_path / "c.png").pixels
    assert not torch.equal(of_run, averaged)
    assert not torch.equal(on_base, averaged)


def test_other_text_than_an_adapter_was_trained_with_is_noted(
    config: Config, base: Path, tmp_path: Path
) -> None:
    lower = ("text.lowercase=true", f"data.dir={config.run.dir.with_name('lower')}")
    embedded(again(config, *lower))
    run = adapting(config, base, *lower)
    trained(run)
    notes = sampled(base, "4", out=tmp_path / "a.png", adapter=(str(run.run.dir),)).notes
    assert any("was trained with another text.lowercase" in note for note in notes)
    assert not sampled(run.run.dir, "4", out=tmp_path / "b.png").notes


def test_a_scheduler_that_is_not_known_gives_no_shift(config: Config, base: Path) -> None:
    place = config.run.dir.with_name("pipeline")
    shutil.copytree(checkpoint.steps(base)[-1], place)
    for name in ("sana.json", "manifest.json"):  # a diffusers pipeline
        (place / name).unlink()
    path = place / "scheduler" / "scheduler_config.json"
    content = files.read_json(path) | {"flow_shift": 5.0}
    files.write_json(path, content)
    found = with_base_recipe(adapting(config, place, "objective.flow_shift=null"))
    assert found.objective.flow_shift == 5
    files.write_json(path, content | {"use_karras_sigmas": True})
    with pytest.raises(SanaError, match="the base's scheduler, which is not known"):
        with_base_recipe(adapting(config, place, "objective.flow_shift=null"))


def test_keys_of_adapters_without_a_kind_are_named(config: Config) -> None:
    with pytest.raises(SanaError, match="adapter.rank: is given, and adapter.kind is not"):
        again(config, "adapter.rank=4")
    assert not again(config, "adapter.kind=none", "adapter.rank=4").adapter.on


def test_a_run_of_adapters_that_diverges_is_not_told_to_begin_from_them(
    config: Config, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = adapting(config, base)
    straight = RectifiedFlow.losses
    calls = []

    def broken(self: RectifiedFlow, *given: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"loss": straight(self, *given)["loss"] * (float("nan") if len(calls) > 2 else 1.0)}

    monkeypatch.setattr(RectifiedFlow, "losses", broken)
    with pytest.raises(SanaError, match=r"start again with another") as caught:
        trained(run)
    assert "init_from" not in str(caught.value)
