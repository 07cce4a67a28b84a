"""diffusers' folders and files, whole, sharded or a variant; and what is not a SANA."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import embedded, sampled, small_config
from helpers.sanas import (
    PIXELS,
    lesson_file,
    published,
    reference,
    same,
)
from safetensors.torch import load_file, save_file

from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.commands.sample import SampleOptions, sample
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.keys import Architecture
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.runtime import files
from sana_cli.weights import checkpoint, configs
from sana_cli.weights.reader import read_weights


def test_what_diffusers_saves_loads_here(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = Architecture(
        sample_size=8, patch_size=2, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8, caption_channels=10,
    )  # fmt: skip
    theirs = diffusers.SanaTransformer2DModel.from_config(configs.diffusers_config(config)).eval()
    theirs.save_pretrained(tmp_path / "saved")
    ours = checkpoint.load_transformer(tmp_path / "saved")
    assert ours.config == config
    x, captions, timestep = torch.randn(1, 1, 8, 8), torch.randn(1, 3, 10), torch.tensor([500.0])
    with torch.no_grad():
        assert torch.allclose(ours(x, captions, timestep), theirs(x, captions, timestep).sample, atol=1e-5)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    config = Architecture(
        sample_size=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, caption_channels=10
    )
    weights = build(config).state_dict()
    weights["proj_out.bias"] = torch.zeros(3)
    weights["extra.weight"] = torch.zeros(1)
    del weights["scale_shift_table"]

    files.write_tensors(tmp_path / configs.WEIGHTS, weights)
    files.write_json(tmp_path / "config.json", configs.diffusers_config(config))
    with pytest.raises(SanaError) as caught:
        checkpoint.load_transformer(tmp_path)
    lines = str(caught.value).splitlines()
    assert "does not fit" in lines[0]
    assert lines[1:] == [
        "  missing: scale_shift_table (2, 16)",
        "  unexpected: extra.weight (1,)",
        "  proj_out.bias is (3,), not (64,)",
    ]
    files.write_json(tmp_path / "config.json", configs.diffusers_config(config) | {"norm_eps": 1e-5})
    with pytest.raises(SanaError, match=r"norm_eps = 1e-05 is not supported"):
        checkpoint.load_transformer(tmp_path)


# --- folders and files of diffusers -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_what_diffusers_saves_loads(
    tmp_path: Path, variant: str | None, max_shard_size: str, dtype: torch.dtype
) -> None:
    theirs = reference(PIXELS)
    torch.nn.Module.to(theirs, dtype)
    theirs.save_pretrained(tmp_path / "transformer", variant=variant, max_shard_size=max_shard_size)
    files = list((tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) > 2 if max_shard_size == "20KB" else len(files) == 1
    expected = theirs.state_dict()
    for path in (tmp_path / "transformer", tmp_path):
        ours = checkpoint.load_transformer(path, dtype=None)
        assert ours.config == PIXELS
        assert all(
            torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in ours.state_dict().items()
        )
        assert {tensor.dtype for tensor in ours.parameters()} == {
            torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        }
    assert same(checkpoint.load_transformer(tmp_path), torch.nn.Module.to(theirs, torch.float32)) < 1e-5


def test_the_plain_weights_come_before_a_variant(tmp_path: Path) -> None:
    theirs = reference(PIXELS)
    theirs.save_pretrained(tmp_path)
    for variant in ("bf16", "fp16", "another"):
        with torch.no_grad():
            theirs.proj_out.bias += 1
        theirs.save_pretrained(tmp_path, variant=variant)
    plain, variant = (load_file(tmp_path / f"diffusion_pytorch_model{v}.safetensors") for v in ("", ".fp16"))
    assert torch.equal(checkpoint.load_transformer(tmp_path).proj_out.bias, plain["proj_out.bias"])
    named = checkpoint.load_transformer(tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(named.proj_out.bias, variant["proj_out.bias"])
    for first in ("", ".bf16", ".fp16"):  # the best of the remaining files
        path = tmp_path / f"diffusion_pytorch_model{first}.safetensors"
        assert torch.equal(
            checkpoint.load_transformer(tmp_path).proj_out.bias, load_file(path)["proj_out.bias"]
        )
        path.unlink()


def test_shards_are_looked_for_beside_their_list_only(tmp_path: Path) -> None:
    theirs = reference(PIXELS)
    theirs.save_pretrained(tmp_path / "x", max_shard_size="20KB")
    index = tmp_path / "x" / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    for wrong in ("../elsewhere.safetensors", "/etc/passwd", 3):
        content["weight_map"]["proj_out.bias"] = wrong
        index.write_text(json.dumps(content))
        with pytest.raises(SanaError, match="does not list the shards beside it"):
            checkpoint.load_transformer(tmp_path / "x")


def test_a_bare_diffusers_file_of_a_published_width(tmp_path: Path) -> None:
    config = published("Sana-Sprint 0.6B", num_layers=1)
    state = {name: tensor.contiguous() for name, tensor in reference(config).state_dict().items()}
    save_file(state, tmp_path / "some.safetensors")
    assert checkpoint.load_transformer(tmp_path / "some.safetensors").config == config


def test_our_own_file_speaks_for_itself(tmp_path: Path) -> None:
    """Outside its folder: its metadata describe the model."""
    config = small_config(tmp_path)
    embedded(config)
    list(train(TrainOptions(config)))
    step = tmp_path / "run" / "checkpoints" / "step-000004"
    alone = tmp_path / "alone.safetensors"
    shutil.copy(step / "transformer" / configs.WEIGHTS, alone)
    whole = checkpoint.load_transformer(step)
    assert checkpoint.load_transformer(alone).config == whole.config
    metadata = files.read_metadata(alone)
    assert metadata["step"] == "4"
    assert re.fullmatch(r"sana \d+\.\d+.*", metadata["made_by"])
    assert re.fullmatch(r"[0-9a-f]{64}", metadata["config_sha256"])
    assert not any(secret in str(metadata) for secret in ("/tmp", "/root", "/home", os.uname().nodename))
    assert sampled(alone, "4", encoder="tiny", out=tmp_path / "o.png").pixels.shape == (1, 1, 16, 16)
    report = inspect(InspectOptions(str(alone)))
    assert report.kind == "transformer"
    assert report.facts["encoder"] == "not on record"
    with pytest.raises(
        SanaError,
        match="takes caption states 128 wide, and whose they are is not on record\n.*`encoder` PATH",
    ):
        list(sample(SampleOptions(("4",), alone, device="cpu")))


# --- refusals -----------------------------------------------------------------------------------------------


def test_odd_shapes_keys_and_configs_are_messages(tmp_path: Path) -> None:
    whole = dict(reference(PIXELS).state_dict())
    config = configs.diffusers_config(PIXELS)
    for name in (
        "patch_embed.proj.weight",
        "transformer_blocks.0.ff.conv_point.weight",
        "caption_projection.linear_1.weight",
    ):
        for shape in ((), (3,), (0, 2, 2, 2), (2, 2, 2, 2, 2)):
            torch.save(whole | {name: torch.zeros(shape)}, tmp_path / "x.pth")
            with pytest.raises(SanaError):
                checkpoint.load_transformer(tmp_path / "x.pth")
            path = lesson_file(tmp_path / "diffusion-1.pt", reference(PIXELS))
            content = torch.load(path, weights_only=True)
            content["model_state_dict"]["_score_network." + name] = torch.zeros(shape)
            torch.save(content, path)
            with pytest.raises(SanaError):
                checkpoint.load_transformer(path)
    torch.save({1: torch.zeros(1), "state_dict": {2: torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(SanaError, match="holds no SANA"):
        checkpoint.load_transformer(tmp_path / "x.pth")
    stray = {f"transformer_blocks.{n}.x": torch.zeros(1) for n in range(2000)}
    torch.save(whole | stray, tmp_path / "x.pth")
    with pytest.raises(SanaError):
        checkpoint.load_transformer(tmp_path / "x.pth")
    save_file(whole, tmp_path / configs.WEIGHTS)
    for change in (
        {"num_layers": 10**9}, {"mlp_ratio": 1e-9}, {"mlp_ratio": 1e308}, {"patch_size": 10**12},
        {"num_layers": "two"},
        {"sample_size": 4, "interpolation_scale": 1.0}, {"num_attention_heads": 65536,
        "attention_head_dim": 65536},
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(SanaError, match=r"config\.json: "):
            checkpoint.load_transformer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"sample_size": None}))
    assert checkpoint.load_transformer(tmp_path).config.sample_size == 32
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SanaError, match=r"config\.json cannot be read as JSON"):
        checkpoint.load_transformer(tmp_path)


def test_names_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and folders are recognised by their content; `.` is a folder like any other."""
    reference(PIXELS).save_pretrained(tmp_path / "transformer")
    shutil.copy(tmp_path / "transformer" / configs.WEIGHTS, tmp_path / "transformer" / "blob")
    torch.save(
        {"state_dict": {f"_orig_mod.module.{k}": t for k, t in reference(PIXELS).state_dict().items()}},
        tmp_path / "p",
    )
    shutil.copy(tmp_path / "transformer" / "config.json", tmp_path / "config.json")
    for target in ("transformer/blob", "p"):
        assert inspect(InspectOptions(str(tmp_path / target))).kind == "transformer"
    monkeypatch.chdir(tmp_path / "transformer")
    assert inspect(InspectOptions(".")).kind == "transformer"


def test_what_is_no_sana_is_said(tmp_path: Path) -> None:
    def saved(content: Any, name: str = "x.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes((10**9).to_bytes(8, "little") + b"{}")
    odd = build(Architecture(sample_size=8, caption_channels=4), seed=0).state_dict()
    lesson = lesson_file(tmp_path / "diffusion-1.pt", reference(PIXELS), config={})
    for path, message in (
        (
            saved({"encoder.weight": torch.zeros(1)}, "a.pth"),
            "holds no SANA: its tensors are called encoder.weight",
        ),
        (saved({}, "b.pth"), "holds no SANA: its tensors are called none"),
        (saved([1, 2], "c.pth"), "holds no dictionary of weights"),
        (
            saved({"state_dict": {"x_embedder.proj.weight": torch.zeros(1152, 32, 1, 1)}}, "d.pth"),
            "missing: transformer_blocks.0",
        ),
        (tmp_path / "text.pth", "neither safetensors nor a checkpoint of PyTorch's"),
        (tmp_path / "cut.safetensors", "damaged or missing"),
        (saved(odd, "e.pth"), "how many attention heads its width of 128 is split into cannot be told"),
        (lesson, "has a model_state_dict, but not the lesson's config"),
    ):
        with pytest.raises(SanaError, match=re.escape(message)):
            checkpoint.load_transformer(path)


# --- training from them -------------------------------------------------------------------------------------


def test_training_starts_from_any_of_them(tmp_path: Path) -> None:
    theirs = reference(PIXELS)
    theirs.save_pretrained(tmp_path / "diffusers", variant="fp16", max_shard_size="20KB")
    sources = {1.0: tmp_path / "diffusers", 0.001: lesson_file(tmp_path / "lesson.pt", theirs)}
    shape = [
        f"model.{name}={getattr(PIXELS, name)}"
        for name in ("num_layers", "num_attention_heads", "attention_head_dim", "cross_attention_head_dim")
    ]
    config = small_config(tmp_path, *shape)
    embedded(config)
    for scale, source in sources.items():
        run = [
            *shape,
            f"run.dir={tmp_path / f'run-{scale}'}",
            f"train.init_from={source}",
            "train.steps=1",
            "optim.warmup_steps=0",
        ]
        begun = small_config(tmp_path, *run, f"model.timestep_scale={scale}", "optim.lr=1e-12")
        list(train(TrainOptions(begun)))
        after = checkpoint.load_transformer(tmp_path / f"run-{scale}", weights="raw")
        before = checkpoint.load_transformer(source)
        assert before.config.timestep_scale == scale
        for name, tensor in before.state_dict().items():
            assert torch.allclose(after.state_dict()[name], tensor, atol=1e-6), name
        other = small_config(
            tmp_path, *run, f"model.timestep_scale={scale / 2}", f"run.dir={tmp_path / 'refused'}"
        )
        with pytest.raises(SanaError, match=rf"model\.timestep_scale: it has {scale}, not {scale / 2}"):
            list(train(TrainOptions(other)))
        assert not (tmp_path / "refused" / "checkpoints").exists()


def test_a_header_with_one_offset_is_damaged(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SanaError, match="is damaged"):
        read_weights(path)
