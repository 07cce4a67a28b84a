"""`sana merge`: adapters worked into their model, against the side branches that they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import again, embedded, invoke, sampled, trained
from helpers.sanas import official, published
from safetensors.torch import load_file

from sana_cli.adapters import LowRank
from sana_cli.commands.merge import MergeOptions, MergeSummary, merge
from sana_cli.config.keys import Config
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.sampling.pipeline import open_pipeline
from sana_cli.weights import checkpoint
from sana_cli.weights.adapters import shapes_of, write_adapter
from sana_cli.weights.reader import read_weights

diffusers = pytest.importorskip("diffusers")


def merging(place: Path, out: Path, **options: Any) -> MergeSummary:
    *_, summary = merge(MergeOptions(place, out, **options))
    assert isinstance(summary, MergeSummary)
    return summary


@pytest.fixture
def adapted(config: Config) -> tuple[Path, Path]:
    """A base, and a run of adapters on it."""
    embedded(config)
    base = config.run.dir.with_name("base")
    trained(again(config, "train.steps=2", "optim.lr=0.02", f"run.dir={base}"))
    run = again(config, f"train.init_from={base}", "adapter.kind=dora", "adapter.rank=2", "optim.lr=0.02")
    trained(run)
    return base, run.run.dir


def output(place: Path, **options: Any) -> torch.Tensor:
    model = checkpoint.load_transformer(place, **options)
    generator = torch.Generator().manual_seed(1)
    x, states = torch.randn(2, 1, 16, 16, generator=generator), torch.randn(2, 3, 128, generator=generator)
    with torch.no_grad():
        return model(x, states, torch.tensor([100.0, 900.0]))


def test_a_merged_run_is_the_run(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = adapted
    before = load_file(checkpoint.steps(base)[-1] / "transformer" / "diffusion_pytorch_model.safetensors")
    found = merging(run, tmp_path / "merged")
    assert (found.kind, found.layers, found.lost) == ("checkpoint", 10, 0)
    assert 0.001 < found.update < 1
    torch.testing.assert_close(output(tmp_path / "merged"), output(run), rtol=0, atol=2e-6)
    assert not torch.allclose(output(run), output(base), atol=1e-3)
    after = load_file(checkpoint.steps(base)[-1] / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before), "the base was touched"
    theirs = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "merged", subfolder="transformer")
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in before.values())
    drawn = sampled(tmp_path / "merged", "4 two", out=tmp_path / "m.png").pixels
    assert (drawn.int() - sampled(run, "4 two", out=tmp_path / "r.png").pixels.int()).abs().max() <= 1
    listing = json.loads(invoke("inspect", "--json", str(tmp_path / "merged")).stdout)
    assert "adapters" not in listing


def test_scales_and_several_adapters_are_merged_as_they_are_worn(
    adapted: tuple[Path, Path], tmp_path: Path
) -> None:
    base, run = adapted
    model = checkpoint.load_transformer(base)
    shapes, generator = shapes_of(model), torch.Generator().manual_seed(3)
    second = {
        name: LowRank(
            torch.randn(2, torch.Size(shape[1:]).numel(), generator=generator),
            torch.randn(shape[0], 2, generator=generator) * 0.02,
        )
        for name, shape in shapes.items()
        if name.endswith(("to_q", "conv_inverted"))
    }
    write_adapter(tmp_path / "second.safetensors", second, shapes)
    given = (f"{run}:0.5", f"{tmp_path / 'second.safetensors'}:-2")
    merging(base, tmp_path / "both", adapter=given)
    from sana_cli.weights.applied import read_applied

    applied = [one.changes for one in read_applied(given, model.config)]
    torch.testing.assert_close(output(tmp_path / "both"), output(base, applied=applied), rtol=0, atol=5e-6)
    assert not torch.allclose(output(tmp_path / "both"), output(base), atol=1e-3)


def test_rounding_to_bf16_is_measured(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = adapted
    found = merging(base, tmp_path / "half", adapter=(f"{run}:0.01",), dtype="bf16")
    kept = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    exact = merging(base, tmp_path / "whole", adapter=(f"{run}:0.01",))
    whole = load_file(tmp_path / "whole" / "transformer" / "diffusion_pytorch_model.safetensors")
    own = load_file(checkpoint.steps(base)[-1] / "transformer" / "diffusion_pytorch_model.safetensors")
    names = [name for name in own if not torch.equal(own[name], whole[name])]
    assert len(names) == exact.layers
    lost = sum(float((kept[name].double() - whole[name].double()).square().sum()) for name in names)
    moved = sum(float((whole[name].double() - own[name].double()).square().sum()) for name in names)
    assert found.lost == pytest.approx((lost / moved) ** 0.5, rel=1e-3)
    assert found.lost > 0.01


def test_a_file_of_weights_becomes_a_folder_of_diffusers(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = adapted
    alone = checkpoint.steps(base)[-1] / "transformer"
    found = merging(alone, tmp_path / "alone", adapter=(str(run),))
    assert found.kind == "transformer"
    diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "alone")
    torch.testing.assert_close(output(tmp_path / "alone"), output(run), rtol=0, atol=2e-6)


def test_what_cannot_be_merged_is_said(adapted: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = adapted
    new = tmp_path / "x"
    for place, out, adapter, match in (
        (base, new, (), "has no adapters of its own"),
        (run, base, (), "is there already"),
        (checkpoint.steps(run)[-1], checkpoint.steps(run)[-1] / "in", (), "is inside"),
        (base, new, (f"{run}:1e39",), "not finite"),
        (base, new, ("nowhere",), "no file or folder nowhere"),
        (base, new, (f"{run}:nan",), "not a finite number"),
        (base, new, (str(base),), "trained all weights, not adapters"),
    ):
        with pytest.raises(SanaError, match=match):
            merging(place, out, adapter=adapter)
    assert not (tmp_path / "x").exists()
    assert invoke("merge").exit_code == 2
    assert "`out`" not in invoke("merge", str(run)).output


def test_an_adapter_is_described(adapted: tuple[Path, Path]) -> None:
    _, run = adapted
    step = checkpoint.steps(run)[-1]
    file = step / "pytorch_lora_weights.safetensors"
    found = json.loads(invoke("inspect", "--json", str(file)).stdout)
    assert (found["kind"], found["form"], found["of"]) == (
        "adapter",
        "diffusers (DoRA)",
        "base/checkpoints/step-000002",
    )
    assert {row["layer"] for row in found["table"]} >= {"attn1.to_q", "ff.conv_inverted"}
    whole = json.loads(invoke("inspect", "--json", str(run)).stdout)
    assert whole["adapters"] == "DoRA of rank 2 on 10 layers"
    assert whole["of"].startswith("base/checkpoints/step-000002 (diffusers, ")


def test_a_merged_model_keeps_what_it_predicts_and_no_score(config: Config, tmp_path: Path) -> None:
    embedded(config)
    base = config.run.dir.with_name("base")
    own = ("objective.prediction_type=sample", "optim.lr=0.02")
    trained(again(config, "train.steps=2", f"run.dir={base}", *own))
    trained(again(config, f"train.init_from={base}", "adapter.kind=lora", *own))
    precious = tmp_path / "m.partial" / "mine.txt"
    precious.parent.mkdir()
    precious.write_text("mine")
    merging(config.run.dir, tmp_path / "m")
    assert precious.read_text() == "mine"
    alone = tmp_path / "alone.safetensors"
    shutil.copyfile(tmp_path / "m" / "transformer" / "diffusion_pytorch_model.safetensors", alone)
    assert read_weights(alone).prediction_type == "sample"
    record = checkpoint.read_record(tmp_path / "m")
    assert (record.base, record.score) == (None, None)
    assert "lora" not in (tmp_path / "m" / "README.md").read_text()


def test_a_merged_official_model_keeps_its_text(tmp_path: Path) -> None:
    """Official models were trained under another instruction than diffusers sends, and without lower case."""
    model = build(published("Sana 0.6B", num_layers=1), seed=0)
    file = tmp_path / "sana.pth"
    torch.save({"state_dict": official(model.state_dict(), False)}, file)
    shapes = shapes_of(model)
    name = "transformer_blocks.0.attn1.to_q"
    change = LowRank(torch.ones(1, shapes[name][1]), torch.ones(shapes[name][0], 1) * 1e-3)
    write_adapter(tmp_path / "a.safetensors", {name: change}, shapes)
    merging(file, tmp_path / "merged", adapter=(str(tmp_path / "a.safetensors"),))
    before, after = open_pipeline(file), open_pipeline(tmp_path / "merged")
    assert (after.text, after.sample, after.origin) == (before.text, before.sample, "official")
    diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "merged")
