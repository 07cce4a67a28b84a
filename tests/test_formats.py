"""Other people's files: recognised by what is in them, and computing what their owners' code computes."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import embedded, small_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.commands.sample import SampleOptions, sample
from sana_cli.commands.train import TrainOptions, train
from sana_cli.config.keys import ModelConfig, SampleConfig
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.runtime import files
from sana_cli.sampling import sampler
from sana_cli.sampling.pipeline import DC_AE, OFFICIAL_INSTRUCTION, open_pipeline
from sana_cli.weights import checkpoint, configs
from sana_cli.weights.reader import identify, read_weights
from sana_cli.weights.stored import check_tensors

diffusers = pytest.importorskip("diffusers")

# layers, self heads of 32, cross heads and their width, norm of q and k, guidance, parameters (diffusers' conversion script)
PUBLISHED = {
    "Sana 0.6B": (28, 36, 16, 72, False, False, 591_747_872),
    "Sana 1.6B": (20, 70, 20, 112, False, False, 1_604_462_752),
    "Sana 1.5 1.6B": (20, 70, 20, 112, True, False, 1_604_641_952),
    "Sana 1.5 4.8B": (60, 70, 20, 112, True, False, 4_721_825_952),
    "Sana-Sprint 0.6B": (28, 36, 16, 72, True, True, 593_501_216),
    "Sana-Sprint 1.6B": (20, 70, 20, 112, True, True, 1_610_237_472),
}


def published(name: str, **fields: Any) -> ModelConfig:
    layers, heads, cross_heads, cross_dim, qk_norm, guidance, _ = PUBLISHED[name]
    shape = {
        "in_channels": 32, "patch_size": 1, "sample_size": 32, "num_layers": layers, "num_attention_heads": heads,
        "attention_head_dim": 32, "num_cross_attention_heads": cross_heads, "cross_attention_head_dim": cross_dim,
        "caption_channels": 2304, "qk_norm": "rms_norm_across_heads" if qk_norm else None, "guidance_embeds": guidance,
    }  # fmt: skip
    return ModelConfig.model_validate(shape | fields)


def official(state: Mapping[str, Tensor], sprint: bool) -> dict[str, Tensor]:
    """A diffusers state dict in NVlabs/Sana's names, written from its classes (`sana_multi_scale.py`, `sana_blocks.py`)."""
    left = dict(state)
    out: dict[str, Tensor] = {}

    def move(theirs: str, *ours: str, leaves: tuple[str, ...] = ("weight", "bias")) -> None:
        for leaf in leaves:
            if all(f"{name}.{leaf}" in left for name in ours):
                out[f"{theirs}.{leaf}"] = torch.cat([left.pop(f"{name}.{leaf}") for name in ours])

    time = "time_embed." if sprint else "time_embed.emb."
    move("x_embedder.proj", "patch_embed.proj")
    for index in (0, 2):
        move(f"t_embedder.mlp.{index}", f"{time}timestep_embedder.linear_{1 + index // 2}")
        move(f"cfg_embedder.mlp.{index}", f"time_embed.guidance_embedder.linear_{1 + index // 2}")
    move("t_block.1", "time_embed.linear")
    for index in (1, 2):
        move(f"y_embedder.y_proj.fc{index}", f"caption_projection.linear_{index}")
    move("attention_y_norm", "caption_norm")
    move("final_layer.linear", "proj_out")
    out["final_layer.scale_shift_table"] = left.pop("scale_shift_table")
    for block in range(sum(1 for name in state if re.fullmatch(r"transformer_blocks\.\d+\.scale_shift_table", name))):
        old, new = f"transformer_blocks.{block}.", f"blocks.{block}."
        out[new + "scale_shift_table"] = left.pop(old + "scale_shift_table")
        move(new + "attn.qkv", *(f"{old}attn1.to_{part}" for part in "qkv"))
        move(new + "attn.q_norm", old + "attn1.norm_q")
        move(new + "attn.k_norm", old + "attn1.norm_k")
        move(new + "attn.proj", old + "attn1.to_out.0")
        move(new + "cross_attn.q_linear", old + "attn2.to_q")
        move(new + "cross_attn.kv_linear", old + "attn2.to_k", old + "attn2.to_v")
        move(new + "cross_attn.q_norm", old + "attn2.norm_q")
        move(new + "cross_attn.k_norm", old + "attn2.norm_k")
        move(new + "cross_attn.proj", old + "attn2.to_out.0")
        move(new + "mlp.inverted_conv.conv", old + "ff.conv_inverted")
        move(new + "mlp.depth_conv.conv", old + "ff.conv_depth")
        move(new + "mlp.point_conv.conv", old + "ff.conv_point")
    assert not left, sorted(left)
    return out


def hollow(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Tensors of these shapes that take no room, in memory or in a file: one zero, seen many times."""
    return {name: torch.zeros((), dtype=dtype).expand(tensor.shape) for name, tensor in tensors.items()}


def extras(name: str, side: int = 32) -> dict[str, Tensor]:
    width = 32 * PUBLISHED[name][1]
    return {
        "pos_embed": torch.zeros(()).expand(1, side * side, width),
        "y_embedder.y_embedding": torch.zeros(()).expand(300, 2304),
        "logvar_linear.weight": torch.zeros(1, width),
        "logvar_linear.bias": torch.zeros(1),
    }


# --- published models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_extras", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_recognised(name: str, with_extras: bool, tmp_path: Path) -> None:
    """At full size, from a .pth as NVlabs/Sana saves them."""
    config = published(name)
    model = build(config, seed=None)
    assert checkpoint.parameter_count(model.parameters()) == PUBLISHED[name][-1]
    state = hollow(official(model.state_dict(), config.guidance_embeds)) | (extras(name) if with_extras else {})
    path = tmp_path / "called-anything.bin"
    torch.save({"epoch": 1, "state_dict": state}, path)
    found = read_weights(path)
    check_tensors(found.tensors, model, path, "the published model")
    assert found.model == config
    assert (found.origin, configs.family(found.model)) == ("official", name)
    report = inspect(InspectOptions(str(path)))
    assert report.facts["family"] == name
    assert report.facts["parameters"] == PUBLISHED[name][-1]
    assert report.facts["autoencoder"] == DC_AE
    assert report.facts["encoder"] == "Efficient-Large-Model/gemma-2-2b-it"
    assert ("also holds" in report.facts) == with_extras


@pytest.mark.parametrize(
    "kept", [(), ("pos_embed",), ("logvar_linear.weight", "logvar_linear.bias"), ("y_embedder.y_embedding",)]
)
def test_each_extra_may_be_there_or_not(kept: tuple[str, ...]) -> None:
    """diffusers' script takes them out in one `try`, and fails where only some are there."""
    config = published("Sana 0.6B")
    state = official(build(config, seed=None).state_dict(), sprint=False)
    state |= {name: tensor for name, tensor in extras("Sana 0.6B").items() if name in kept}
    found = identify(state, Path("x.pth"))
    assert found.model == config
    assert set(found.left_out) == set(kept)


@pytest.mark.parametrize(("side", "scale", "shift"), [(16, None, 3.0), (32, None, 3.0), (64, 1.0, 3.0), (128, 2.0, 6.0)])
def test_resolution_is_read_off_the_positions(side: int, scale: float | None, shift: float, tmp_path: Path) -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    name = "Sana 1.6B"
    state = hollow(official(build(published(name), seed=None).state_dict(), sprint=False)) | extras(name, side)
    if scale is not None:
        table = get_2d_sincos_pos_embed(2240, side, base_size=side, interpolation_scale=scale, output_type="pt")
        state["pos_embed"] = table[None].to(torch.bfloat16)
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    pipeline = open_pipeline(tmp_path / "x.pth")
    assert pipeline.model == published(name, sample_size=side, interpolation_scale=scale)
    if side == 32:  # the official 0.6B at this size has a shift of its own
        small = official(build(published("Sana 0.6B"), seed=None).state_dict(), sprint=False) | extras("Sana 0.6B", side)
        torch.save({"state_dict": hollow(small)}, tmp_path / "y.pth")
        assert open_pipeline(tmp_path / "y.pth").sample.flow_shift == 4.0
    assert (pipeline.sample.solver, pipeline.sample.flow_shift, pipeline.sample.guidance_scale) == ("dpm++", shift, 4.5)
    assert pipeline.text is not None
    assert pipeline.text.instruction == OFFICIAL_INSTRUCTION


def test_other_positions_are_refused() -> None:
    state = hollow(official(build(published("Sana 1.6B"), seed=None).state_dict(), sprint=False))
    state["pos_embed"] = torch.randn(1, 16, 2240)
    with pytest.raises(SanaError, match="pos_embed is neither zeros nor sine-cosine positions"):
        identify(state, Path("x.pth"))


# --- numbers ----------------------------------------------------------------------------------------------------------


def same(ours: Any, theirs: Any, guidance: bool = False, time_scale: float = 1.0) -> float:
    """The largest difference of two models over their largest output."""
    config = ours.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, 3 * config.patch_size, 2 * config.patch_size, generator=generator)
    captions = torch.randn(2, 4, config.caption_channels, generator=generator)
    time, mask = time_scale * torch.tensor([3.0, 700.0]), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    scale = torch.tensor([0.1, 0.45]) if guidance else None
    with torch.no_grad():
        found = ours(x, captions, time, scale, mask)
        expected = theirs(x, captions, time, guidance=scale, encoder_attention_mask=mask).sample
    return float((found - expected).abs().max() / expected.abs().max())


def reference(config: ModelConfig) -> Any:
    """diffusers' model with random weights in which everything shows."""
    torch.manual_seed(0)
    model = diffusers.SanaTransformer2DModel.from_config(configs.diffusers_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("name", ["Sana 0.6B", "Sana-Sprint 0.6B"])
def test_official_files_give_diffusers_numbers(name: str, tmp_path: Path) -> None:
    config = published(name, num_layers=1)
    theirs = reference(config)
    state = official(theirs.state_dict(), config.guidance_embeds) | extras(name)
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / "a.pth")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "b.safetensors")
    for file in ("a.pth", "b.safetensors"):
        ours = checkpoint.load_transformer(tmp_path / file)
        assert ours.config == config
        error = same(ours, theirs, config.guidance_embeds)
        print(f"{name}, one layer, {file}: largest error {error:.1e}")
        assert error < 1e-5
    if not config.guidance_embeds:  # diffusers' own converter, which knows the first models only, agrees on the names
        from diffusers.loaders.single_file_utils import convert_sana_transformer_to_diffusers

        converted = convert_sana_transformer_to_diffusers(
            {key: tensor for key, tensor in state.items() if not key.startswith("logvar")}
        )
        found = identify(state, tmp_path / "a.pth").tensors
        assert found.keys() == converted.keys()
        assert all(torch.equal(found[key], converted[key]) for key in converted)


PIXELS = ModelConfig(
    in_channels=1, sample_size=16, patch_size=8, num_layers=2, num_attention_heads=3, attention_head_dim=8,
    num_cross_attention_heads=2, cross_attention_head_dim=12, caption_channels=128,
)  # fmt: skip


def lesson_file(path: Path, theirs: Any, null_seed: int = 1, **changes: Any) -> Path:
    """What the lesson's `save` writes (`training/image/train.py`)."""
    state = {f"_score_network.{k}".replace(".attn2.", ".cross_attn."): t for k, t in theirs.state_dict().items()}
    params = {
        name: getattr(PIXELS, name)
        for name in ("patch_size", "in_channels", "caption_channels", "attention_head_dim", "num_attention_heads", "dropout",
                     "num_cross_attention_heads", "cross_attention_head_dim", "mlp_ratio", "num_layers")
    }  # fmt: skip
    params |= {"input_spatial_size": 16, "out_channels": 1, "cross_attention_dim": PIXELS.inner_dim}
    optimizer = torch.optim.Adam(theirs.parameters(), 2e-4)
    generator = torch.Generator().manual_seed(null_seed)
    content = {
        "step": 9999,
        "model_state_dict": state | {"_unconditional_context.y_embedding": torch.randn(300, 128, generator=generator)},
        "num_optimizers": 1,
        "optimizer_state_dicts": [optimizer.state_dict()],
        "loss": torch.tensor(0.1),
        "config": {"diffusion": {"score_network": {"params": params}}},
    }
    torch.save(content | changes, path)
    return path


def test_the_lesson_computes_the_same_field(tmp_path: Path) -> None:
    """Its network says data - noise at time 1 - sigma; ours noise - data at 1000 sigma timestep_scale."""
    theirs = reference(PIXELS)
    path = lesson_file(tmp_path / "diffusion-9999.pt", theirs)
    ours = checkpoint.load_transformer(path)
    assert ours.config == PIXELS.model_copy(update={"timestep_scale": 0.001})
    x, captions = torch.randn(5, 1, 16, 16), torch.randn(5, 3, 128)
    sigma = torch.tensor([0.0, 0.03, 0.5, 0.9, 1.0])
    with torch.no_grad():
        found = ours(x, captions, 1000 * sigma * ours.config.timestep_scale)
        expected = -theirs(x, captions, 1 - sigma).sample
    error = float((found - expected).abs().max() / expected.abs().max())
    print(f"lesson: largest error {error:.1e}")
    assert error < 1e-5
    assert float((found[0] - found[3]).abs().max()) > 0.01  # the time shows


def test_the_lesson_is_sampled_with_its_own_null_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the mask of each prompt, as it was trained."""
    path = lesson_file(tmp_path / "diffusion-9999.pt", reference(PIXELS))
    pipeline = open_pipeline(path, encoder="tiny")
    assert pipeline.null_caption is not None
    assert pipeline.null_caption.shape == (300, 128)
    assert pipeline.sample.guidance_scale == 1.0

    assert pipeline.null_follows_prompt
    asked: list[list[int]] = []
    original = sampler.sample_images

    def watched(model: Any, captions: Any, nulls: Any, *rest: Any) -> Any:
        asked.append([len(null) - len(caption) for caption, null in zip(captions, nulls, strict=True)])
        return original(model, captions, nulls, *rest)

    monkeypatch.setattr(sampler, "sample_images", watched)

    def draw(**options: Any) -> Tensor:
        *_, last = sample(SampleOptions(("4 two",), path, encoder="tiny", device="cpu", out=tmp_path / "o.png", **options))
        return last.pixels

    assert draw().shape == (2, 1, 16, 16)
    guided = draw(guidance_scale=3.0, steps=4)
    lesson_file(path, reference(PIXELS), null_seed=2)
    assert not torch.equal(draw(guidance_scale=3.0, steps=4), guided)
    assert all(differences == [0, 0] for differences in asked)


# --- diffusers' folders and files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_what_diffusers_saves_loads(tmp_path: Path, variant: str | None, max_shard_size: str, dtype: torch.dtype) -> None:
    theirs = reference(PIXELS)
    torch.nn.Module.to(theirs, dtype)
    theirs.save_pretrained(tmp_path / "transformer", variant=variant, max_shard_size=max_shard_size)
    files = list((tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) > 2 if max_shard_size == "20KB" else len(files) == 1
    expected = theirs.state_dict()
    for path in (tmp_path / "transformer", tmp_path):
        ours = checkpoint.load_transformer(path, dtype=None)
        assert ours.config == PIXELS
        assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in ours.state_dict().items())
        assert {tensor.dtype for tensor in ours.parameters()} == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}
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
    for first in ("", ".bf16", ".fp16"):  # with each the best of those that are left
        path = tmp_path / f"diffusion_pytorch_model{first}.safetensors"
        assert torch.equal(checkpoint.load_transformer(tmp_path).proj_out.bias, load_file(path)["proj_out.bias"])
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
    """Away from its folder: the model is in its metadata."""
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
    *_, drawn = sample(SampleOptions(("4",), alone, encoder="tiny", device="cpu", out=tmp_path / "o.png"))
    assert drawn.pixels.shape == (1, 1, 16, 16)
    report = inspect(InspectOptions(str(alone)))
    assert report.kind == "transformer"
    assert report.facts["encoder"] == "not on record"
    with pytest.raises(SanaError, match="takes caption states 128 wide, and whose they are is not on record\n.*--encoder"):
        list(sample(SampleOptions(("4",), alone, device="cpu")))


# --- refusals ---------------------------------------------------------------------------------------------------------


class Payload:
    """A pickle that runs code when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_malicious_file_is_refused_and_not_run(tmp_path: Path, new_format: bool) -> None:
    proof, path = tmp_path / "it-ran", tmp_path / "model.pth"
    state = hollow(official(build(published("Sana 0.6B"), seed=None).state_dict(), sprint=False))
    torch.save({"state_dict": state, "extra": Payload(proof)}, path, _use_new_zipfile_serialization=new_format)
    for act in (
        lambda: checkpoint.load_transformer(path),
        lambda: inspect(InspectOptions(str(path))),
        lambda: list(sample(SampleOptions(("a",), path, device="cpu"))),
    ):
        with pytest.raises(SanaError, match=r"is refused: beside weights it holds posix\.system.*none of it was run"):
            act()
    assert not proof.exists()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(SanaError, match="refused|neither safetensors nor"):
        checkpoint.load_transformer(tmp_path / "plain.pth")
    assert not proof.exists()


def test_only_plain_numbers_are_weights(tmp_path: Path) -> None:
    state = reference(PIXELS).state_dict()
    name = "proj_out.weight"
    for odd in (
        state[name].to(torch.int8), state[name].to(torch.complex64), state[name] > 0, state[name].to_sparse(),
        state[name].to("meta"), state[name].to(torch.float8_e4m3fn),
    ):  # fmt: skip
        torch.save(state | {name: odd}, tmp_path / "x.pth")
        lesson = lesson_file(tmp_path / "diffusion-1.pt", reference(PIXELS))
        content = torch.load(lesson, weights_only=True)
        content["model_state_dict"]["_score_network." + name] = odd
        torch.save(content, lesson)
        for path in (tmp_path / "x.pth", lesson):
            with pytest.raises(SanaError, match="proj_out.weight is a tensor of .*; weights are float32"):
                checkpoint.load_transformer(path)


def test_odd_shapes_keys_and_configs_are_messages(tmp_path: Path) -> None:
    whole = dict(reference(PIXELS).state_dict())
    config = configs.diffusers_config(PIXELS)
    for name in ("patch_embed.proj.weight", "transformer_blocks.0.ff.conv_point.weight", "caption_projection.linear_1.weight"):
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
        {"num_layers": 10**9}, {"mlp_ratio": 1e-9}, {"mlp_ratio": 1e308}, {"patch_size": 10**12}, {"num_layers": "two"},
        {"sample_size": 4, "interpolation_scale": 1.0}, {"num_attention_heads": 65536, "attention_head_dim": 65536},
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
    """A file is known by its content, a folder by what it holds, and `.` is a folder like any other."""
    reference(PIXELS).save_pretrained(tmp_path / "transformer")
    shutil.copy(tmp_path / "transformer" / configs.WEIGHTS, tmp_path / "transformer" / "blob")
    torch.save({"state_dict": {f"_orig_mod.module.{k}": t for k, t in reference(PIXELS).state_dict().items()}}, tmp_path / "p")
    shutil.copy(tmp_path / "transformer" / "config.json", tmp_path / "config.json")
    for target in ("transformer/blob", "p"):
        assert inspect(InspectOptions(str(tmp_path / target))).kind == "transformer"
    monkeypatch.chdir(tmp_path / "transformer")
    assert inspect(InspectOptions(".")).kind == "transformer"


def test_a_pickle_in_a_folder_is_not_opened_unasked(tmp_path: Path) -> None:
    theirs = reference(PIXELS)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(SanaError, match="has pickled weights only.*not opened unasked\nname that file"):
        checkpoint.load_transformer(tmp_path)
    assert same(checkpoint.load_transformer(tmp_path / "diffusion_pytorch_model.bin"), theirs) < 1e-5


def test_wrong_tensors_are_listed(tmp_path: Path) -> None:
    state = hollow(official(build(published("Sana 0.6B"), seed=None).state_dict(), sprint=False))
    del state["blocks.3.attn.proj.weight"]
    state["blocks.4.mlp.depth_conv.conv.bias"] = torch.zeros(7)
    state["blocks.0.lora_A"] = torch.zeros(2)
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(SanaError) as caught:
        checkpoint.load_transformer(tmp_path / "x.pth")
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'x.pth'} does not fit the SANA that its shapes describe:",
        "  missing: transformer_blocks.3.attn1.to_out.0.weight (1152, 1152)",
        "  unexpected: transformer_blocks.0.lora_A (2,)",
        "  transformer_blocks.4.ff.conv_depth.bias is (7,), not (5760,)",
    ]


def test_what_is_no_sana_is_said(tmp_path: Path) -> None:
    def saved(content: Any, name: str = "x.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "cut.safetensors").write_bytes((10**9).to_bytes(8, "little") + b"{}")
    odd = build(ModelConfig(sample_size=8, caption_channels=4), seed=0).state_dict()
    lesson = lesson_file(tmp_path / "diffusion-1.pt", reference(PIXELS), config={})
    for path, message in (
        (saved({"encoder.weight": torch.zeros(1)}, "a.pth"), "holds no SANA: its tensors are called encoder.weight"),
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"_class_name": ["x"]}, "is not supported"),
        ({"_class_name": "DDIMScheduler"}, "the scheduler DDIMScheduler is not supported"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "prediction_type = 'epsilon' is not supported"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True},
            "use_karras_sigmas = True is not supported",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "x"}, "shift 'x' is not a positive number"),
        ({"_class_name": "SCMScheduler", "sigma_data": 1.0}, "sigma_data = 1.0 is not supported"),
    ],
)
def test_other_schedulers_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(SanaError, match=message):
        configs.solver_of(content, Path("scheduler_config.json"))


@pytest.mark.parametrize("solver", ["dpm++", "euler", "heun", "scm"])
def test_scheduler_configs_go_out_and_come_back(solver: str, tmp_path: Path) -> None:
    """Through diffusers, which fills in every default."""
    chosen = SampleConfig.model_validate({"solver": solver, "flow_shift": 1.0 if solver == "scm" else 2.5})
    content = configs.scheduler_config(chosen)
    scheduler = getattr(diffusers, content["_class_name"]).from_config(content)
    scheduler.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert configs.solver_of(written, tmp_path) == {"solver": solver, "flow_shift": chosen.flow_shift}
    foresees = configs.scheduler_config(chosen, "sample")
    assert (foresees["_class_name"], foresees["prediction_type"]) == ("DPMSolverMultistepScheduler", "sample")
    assert configs.solver_of(foresees, tmp_path) == {"solver": "dpm++", "flow_shift": chosen.flow_shift}


# --- training from them -----------------------------------------------------------------------------------------------


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
            "train.warmup_steps=0",
        ]
        begun = small_config(tmp_path, *run, f"model.timestep_scale={scale}", "train.lr=1e-12")
        list(train(TrainOptions(begun)))
        after = checkpoint.load_transformer(tmp_path / f"run-{scale}", weights="raw")
        before = checkpoint.load_transformer(source)
        assert before.config.timestep_scale == scale
        for name, tensor in before.state_dict().items():
            assert torch.allclose(after.state_dict()[name], tensor, atol=1e-6), name
        other = small_config(tmp_path, *run, f"model.timestep_scale={scale / 2}", f"run.dir={tmp_path / 'refused'}")
        with pytest.raises(SanaError, match=rf"model\.timestep_scale: it has {scale}, not {scale / 2}"):
            list(train(TrainOptions(other)))
        assert not (tmp_path / "refused" / "checkpoints").exists()
