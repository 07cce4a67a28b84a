"""Adapter files of every form give the same changes; what cannot be applied exactly is refused by name."""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sanas import official
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_cli.adapters import Change, Dense, LowRank
from sana_cli.config.keys import Architecture
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.weights.adapter_names import parse
from sana_cli.weights.adapters import (
    StoredAdapter,
    is_adapter_file,
    read_adapter,
    shapes_of,
    write_adapter,
)
from sana_cli.weights.card import ADAPTER_WEIGHTS

CONFIG = Architecture(
    in_channels=4, patch_size=2, sample_size=8, num_layers=12, num_attention_heads=3, attention_head_dim=8,
    num_cross_attention_heads=2, cross_attention_head_dim=12, caption_channels=16,
)  # fmt: skip
SHAPES = shapes_of(build(CONFIG, seed=None))
SCALE = 0.5
QUERY = "transformer_blocks.0.attn1.to_q"
NAMES = (
    QUERY, "transformer_blocks.1.attn1.to_out.0", "transformer_blocks.11.attn2.to_k", "transformer_blocks.1.attn2.to_v",
    "transformer_blocks.2.ff.conv_inverted", "transformer_blocks.2.ff.conv_point", "patch_embed.proj",
    "time_embed.emb.timestep_embedder.linear_1", "time_embed.linear", "caption_projection.linear_2", "proj_out",
)  # fmt: skip


def known(names: tuple[str, ...] = NAMES, rank: int = 3, dora: bool = False) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in names:
        out, into = SHAPES[name][0], torch.Size(SHAPES[name][1:]).numel()
        norms = 1 + torch.rand(out, generator=generator) if dora else None
        found[name] = LowRank(
            torch.randn(rank, into, generator=generator),
            torch.randn(out, rank, generator=generator),
            SCALE,
            norms,
        )
    return found


KNOWN = known()


def tensors_of(
    changes: Mapping[str, LowRank], down: str, up: str, name: Callable[[str], str], alpha: bool = False
) -> dict[str, Tensor]:
    """A file's tensors: 4-D for convolutions, with alpha in place of a scale in B."""
    found: dict[str, Tensor] = {}
    for layer, own in changes.items():
        key, shape = name(layer), SHAPES[layer]
        left, right = own.lora_A, own.lora_B * (1 if alpha else own.scale)
        if len(shape) == 4:
            left, right = left.reshape(-1, *shape[1:]), right[:, :, None, None]
        found |= {f"{key}{down}": left.clone(), f"{key}{up}": right.clone()}
        if alpha:
            found[f"{key}.alpha"] = torch.tensor(own.scale * own.rank)
    return found


def flat(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer.replace(".", "_")


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda layer: prefix + layer


FORMS: dict[str, tuple[dict[str, Tensor], str]] = {
    "diffusers": (
        tensors_of(KNOWN, ".lora_A.weight", ".lora_B.weight", dotted("transformer.")),
        "diffusers",
    ),
    "diffusers with alphas": (
        tensors_of(KNOWN, ".lora_A.weight", ".lora_B.weight", dotted("transformer."), True),
        "diffusers",
    ),
    "diffusers of 2023": (
        tensors_of(KNOWN, ".lora.down.weight", ".lora.up.weight", dotted("transformer.")),
        "diffusers",
    ),
    "no prefix": (
        tensors_of(KNOWN, ".lora_A.weight", ".lora_B.weight", dotted("")),
        "diffusers, without its prefix",
    ),
    "kohya's parts": (
        tensors_of(KNOWN, ".lora_down.weight", ".lora_up.weight", dotted("transformer."), True),
        "diffusers",
    ),
    "ComfyUI": (
        tensors_of(KNOWN, ".lora_down.weight", ".lora_up.weight", dotted("diffusion_model."), True),
        "ComfyUI",
    ),
    "peft without a config": (
        tensors_of(KNOWN, ".lora_A.weight", ".lora_B.weight", dotted("base_model.model.")),
        "peft",
    ),
    "peft's state dict": (
        tensors_of(KNOWN, ".lora_A.default.weight", ".lora_B.default.weight", dotted("base_model.model.transformer.")),
        "peft",
    ),
    "kohya": (tensors_of(KNOWN, ".lora_down.weight", ".lora_up.weight", flat("lora_unet_"), True), "kohya"),
    "kohya's transformer": (
        tensors_of(KNOWN, ".lora_down.weight", ".lora_up.weight", flat("lora_transformer_"), True),
        "kohya",
    ),
    "OneTrainer": (
        tensors_of(KNOWN, ".lora_down.weight", ".lora_up.weight", flat("lora_"), True),
        "kohya",
    ),
    "LoCon": (tensors_of(KNOWN, ".lora_down.weight", ".lora_up.weight", flat("lycoris_"), True), "LyCORIS"),
}  # fmt: skip


def saved(folder: Path, tensors: Mapping[str, Tensor], **metadata: Any) -> Path:
    path = folder / "adapter.safetensors"
    given = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, given or None)
    return path


def same(found: Mapping[str, Change], expected: Mapping[str, Change]) -> None:
    assert set(found) == set(expected)
    for name, own in expected.items():
        assert found[name].shape == own.shape
        torch.testing.assert_close(found[name].delta(), own.delta(), rtol=1e-5, atol=1e-6)
        if own.magnitude is not None:
            other = found[name].magnitude
            assert other is not None
            torch.testing.assert_close(other, own.magnitude)


def refused(path: Path, *parts: str, shapes: Mapping[str, tuple[int, ...]] | None = SHAPES) -> str:
    with pytest.raises(SanaError) as caught:
        read_adapter(path, shapes)
    message = str(caught.value)
    assert all(part in message for part in (str(path.parent), *parts)), message
    assert len(message.splitlines()) > 1, message
    return message


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("checked", [True, False])
def test_every_form_gives_the_same_changes(form: str, checked: bool, tmp_path: Path) -> None:
    tensors, words = FORMS[form]
    stored = read_adapter(saved(tmp_path, tensors, note="x"), SHAPES if checked else None)
    assert (stored.form, stored.ranks, stored.metadata) == (words, (3,), {"note": "x"})
    assert bool(stored.notes) == form.startswith("peft")
    same(stored.layers, KNOWN)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    for dora in (False, True):
        changes = known(tuple(SHAPES), dora=dora) | known(NAMES[:2], rank=5, dora=dora)
        write_adapter(tmp_path / ADAPTER_WEIGHTS, changes, SHAPES, {"made_by": "sana 1"})
        stored = read_adapter(tmp_path, SHAPES)
        assert (stored.path, stored.ranks) == (tmp_path / ADAPTER_WEIGHTS, (3, 5))
        assert stored.form == ("diffusers (DoRA)" if dora else "diffusers")
        assert stored.metadata["made_by"] == "sana 1"
        same(stored.layers, changes)
        assert {own.scale for own in stored.layers.values()} == {1.0}


def test_the_written_file_is_that_of_diffusers(tmp_path: Path) -> None:
    write_adapter(tmp_path / "x", known(dora=True), SHAPES, dtype=torch.bfloat16)
    found = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "x").items()}
    assert len(found) == 3 * len(NAMES)
    assert found["transformer.patch_embed.proj.lora_A.weight"] == (3, 4, 2, 2)
    assert found["transformer.patch_embed.proj.lora_B.weight"] == (24, 3, 1, 1)
    assert found["transformer.patch_embed.proj.lora_magnitude_vector"] == (1, 24, 1, 1)
    assert found[f"transformer.{QUERY}.lora_A.weight"] == (3, 24)
    assert found[f"transformer.{QUERY}.lora_magnitude_vector"] == (24,)
    with safe_open(tmp_path / "x", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    config = json.loads(metadata["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (3, 3)
    assert config["transformer.target_modules"] == list(NAMES)


def test_adapters_that_diffusers_cannot_read_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(SanaError, match=f"low-rank changes alone, and these are not:\n  {QUERY}"):
        write_adapter(tmp_path / "x", {QUERY: Dense(torch.zeros(24, 24))}, SHAPES)
    with pytest.raises(SanaError, match="DoRA of all layers or none, and these lack it:\n  proj_out"):
        write_adapter(tmp_path / "x", known((QUERY,), dora=True) | known(("proj_out",)), SHAPES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_", "lora_transformer_"])
def test_layers_of_the_official_code_are_found(prefix: str) -> None:
    """Each layer of NVlabs/Sana is ours, or is cut into ours, dotted or flattened."""
    model = build(CONFIG, seed=None)
    state = {name: torch.zeros(tensor.shape[:1]) for name, tensor in model.state_dict().items()}
    for number, name in enumerate(SHAPES):
        state[f"{name}.weight"] += number
    count = 0
    for key, tensor in official(state, sprint=False).items():
        module = key.removesuffix(".weight")
        if module == key or "norm" in key or "depth" in key:
            continue
        name = prefix + (module.replace(".", "_") if prefix.startswith("lora_") else module)
        named = parse(f"{name}.lora_down.weight", SHAPES)
        assert named is not None, name
        assert torch.equal(torch.cat([state[f"{layer}.weight"] for layer in named.layers]), tensor)
        assert named.cut == (len(named.layers) > 1)
        count += len(named.layers)
    assert count == len(SHAPES)


def test_a_fused_matrix_is_cut_exactly(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 24, generator=generator), torch.randn(72, 2, generator=generator)
    norms = torch.rand(72, generator=generator)
    tensors = {
        "blocks.3.attn.qkv.lora_A.weight": down, "blocks.3.attn.qkv.lora_B.weight": up,
        "blocks.3.attn.qkv.lora_magnitude_vector": norms,
    }  # fmt: skip
    found = read_adapter(saved(tmp_path, tensors), SHAPES)
    assert found.form == "NVlabs/Sana (DoRA)"
    layers = [found.layers[f"transformer_blocks.3.attn1.to_{part}"] for part in "qkv"]
    assert torch.equal(torch.cat([own.delta() for own in layers]), up @ down)
    assert torch.equal(torch.cat([own.magnitude for own in layers if own.magnitude is not None]), norms)
    whole = torch.randn(48, 24)
    found = read_adapter(saved(tmp_path, {"lycoris_blocks_3_cross_attn_kv_linear.diff": whole}), SHAPES)
    assert torch.equal(torch.cat([own.delta() for own in found.layers.values()]), whole)
    assert list(found.layers) == ["transformer_blocks.3.attn2.to_k", "transformer_blocks.3.attn2.to_v"]


def lokr(first: str, second: str, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a LoKr, and its product written out; "a b" is a factor of factors."""
    generator = torch.Generator().manual_seed(1)
    out, into = SHAPES[name][0], torch.Size(SHAPES[name][1:]).numel()
    sizes = {"lokr_w1": (4, 2), "lokr_w2": (out // 4, into // 2)}
    tensors, factors, factored = {}, [], False
    for part, how in (("lokr_w1", first), ("lokr_w2", second)):
        rows, columns = sizes[part]
        if how == "whole":
            tensors[part] = torch.randn(rows, columns, generator=generator)
            factors.append(tensors[part])
        else:
            tensors[f"{part}_a"] = torch.randn(rows, 3, generator=generator)
            tensors[f"{part}_b"] = torch.randn(3, columns, generator=generator)
            factors.append(tensors[f"{part}_a"] @ tensors[f"{part}_b"])
            factored = True
    product = torch.einsum("ab,cd->acbd", *factors).reshape(out, into)
    return tensors, product * (2 / 3 if factored else 1)


@pytest.mark.parametrize("name", [QUERY, "transformer_blocks.2.ff.conv_inverted", "proj_out"])
@pytest.mark.parametrize(
    ("first", "second"), [("whole", "whole"), ("whole", "cut"), ("cut", "whole"), ("cut", "cut")]
)
def test_lokr_is_its_kronecker_product(name: str, first: str, second: str, tmp_path: Path) -> None:
    tensors, expected = lokr(first, second, name)
    key = flat("lycoris_")(name)
    whole = {f"{key}.{part}": tensor for part, tensor in tensors.items()} | {f"{key}.alpha": torch.tensor(2)}
    if name.endswith("conv_inverted") and second == "whole":  # as LyCORIS has it of a convolution
        whole[f"{key}.lokr_w2"] = whole[f"{key}.lokr_w2"][:, :, None, None]
    found = read_adapter(saved(tmp_path, whole), SHAPES)
    assert found.form == "LyCORIS (LoKr)"
    assert found.ranks == ()
    torch.testing.assert_close(found.layers[name].delta(), expected)


def test_loha_is_its_product_of_entries(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    key = "lora_unet_transformer_blocks_0_attn1_to_q"
    parts = {
        f"{key}.hada_{part}": torch.randn(shape, generator=generator)
        for part, shape in {"w1_a": (24, 3), "w1_b": (3, 24), "w2_a": (24, 3), "w2_b": (3, 24)}.items()
    }
    found = read_adapter(saved(tmp_path, parts | {f"{key}.alpha": torch.tensor(6.0)}), SHAPES)
    left, right, more, last = parts.values()
    torch.testing.assert_close(found.layers[QUERY].delta(), 2 * (left @ right) * (more @ last))
    assert found.form == "kohya (LoHa)"


def test_norms_of_rows_of_lycoris_are_a_dora(tmp_path: Path) -> None:
    changes = known(NAMES[4:6], dora=True)
    tensors = tensors_of(changes, ".lora_down.weight", ".lora_up.weight", flat("lycoris_"), True)
    for name, own in changes.items():
        assert own.magnitude is not None
        tensors[f"{flat('lycoris_')(name)}.dora_scale"] = own.magnitude[:, None, None, None]
    same(read_adapter(saved(tmp_path, tensors), SHAPES).layers, changes)
    for name in changes:
        tensors[f"{flat('lycoris_')(name)}.dora_scale"] = torch.ones(1, SHAPES[name][1], 1, 1)
    refused(saved(tmp_path, tensors), "conv_inverted.dora_scale", "norms of columns, which are not read")


# --- configs ----------------------------------------------------------------------------------------------------------

LORA = tensors_of(known(NAMES[:2]), ".lora_A.weight", ".lora_B.weight", dotted("transformer."))
PEFT = {name.replace("transformer.", "base_model.model.", 1): tensor for name, tensor in LORA.items()}


def scales(stored: StoredAdapter) -> list[float]:
    return [own.scale for own in stored.layers.values()]


def test_scales_are_those_of_the_config(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def config(**fields: Any) -> dict[str, Any]:
        given = peft.LoraConfig(target_modules=["to_q"], **{"r": 3, "lora_alpha": 6} | fields).to_dict()
        return {key: list(value) if isinstance(value, set) else value for key, value in given.items()}

    cases: tuple[tuple[dict[str, Any], list[float]], ...] = (
        ({}, [2.0, 2.0]),
        ({"use_rslora": True}, [6 / 3**0.5] * 2),
        ({"lora_alpha": 1.5}, [0.5, 0.5]),
        ({"alpha_pattern": {"to_q": 3}}, [1.0, 2.0]),
        ({"alpha_pattern": {"^transformer_blocks.1.attn1.to_out.0": 1.5, "to_out.0": 9}}, [2.0, 0.5]),
        ({"r": 8, "rank_pattern": {"to_q": 3, "0": 3}}, [2.0, 2.0]),
    )  # fmt: skip
    for fields, expected in cases:
        whole = config(**fields)
        packed = {f"transformer.{key}": value for key, value in whole.items()}
        stored = read_adapter(saved(tmp_path, LORA, lora_adapter_metadata=packed), SHAPES)
        assert scales(stored) == pytest.approx(expected), fields
        folder = tmp_path / "peft"
        folder.mkdir(exist_ok=True)
        save_file(PEFT, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(whole))
        for path in (folder, folder / "adapter_model.safetensors"):
            stored = read_adapter(path, SHAPES)
            assert (stored.form, stored.notes) == ("peft", ())
            assert scales(stored) == pytest.approx(expected), fields


GOOD = {"r": 3, "lora_alpha": 3}
CONFIGS: dict[str, tuple[Any, str]] = {
    "bias": (GOOD | {"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
    "modules_to_save": (GOOD | {"modules_to_save": ["proj_out"]}, "modules_to_save = ['proj_out'] is not supported"),
    "fan_in_fan_out": (GOOD | {"fan_in_fan_out": True}, "fan_in_fan_out = True is not supported"),
    "kind": (GOOD | {"peft_type": "LOKR"}, "peft_type = 'LOKR' is not supported"),
    "pissa": (GOOD | {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
    "new": (GOOD | {"use_magic": {"a": 1}}, "use_magic = {'a': 1} is not supported"),
    "lora_bias": (GOOD | {"lora_bias": True}, "lora_bias = True is not supported"),
    "pattern": (GOOD | {"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern has '(a+)+$', which is no name"),
    "other rank": (GOOD | {"r": 4}, f"{QUERY}: its rank is 3, and 4 in"),
    "rank": (GOOD | {"r": 0}, "r = 0 is no rank"),
    "rank of true": (GOOD | {"r": True}, "r = True is no rank"),
    "huge": (GOOD | {"lora_alpha": 10**400}, "lora_alpha = a huge number is no number"),
    "alpha": (GOOD | {"lora_alpha": "x" * 99}, "lora_alpha = 'xxxxx"),
    "nan": (GOOD | {"lora_alpha": float("nan")}, "lora_alpha = nan is no number"),
    "patterns": (GOOD | {"rank_pattern": [1]}, "rank_pattern = [1] is no JSON object"),
    "flag": (GOOD | {"use_rslora": "yes"}, "use_rslora = 'yes' is neither true nor false"),
    "no alpha": ({"r": 3}, "lacks lora_alpha"),
    "no norms": (GOOD | {"use_dora": True}, "has no lora_magnitude_vector, and"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_that_ask_for_more_are_refused(kind: str, tmp_path: Path) -> None:
    content, message = CONFIGS[kind]
    packed = {f"transformer.{key}": value for key, value in content.items()}
    refused(saved(tmp_path, LORA, lora_adapter_metadata=packed), message)
    save_file(PEFT, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    refused(tmp_path / "adapter_model.safetensors", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "is no JSON object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"text_encoder.r": 4}', "is of more than a transformer:\n  text_encoder.r"),
        ("{}", "lacks r"),
    ],
)
def test_metadata_that_is_no_config(text: str, message: str, tmp_path: Path) -> None:
    refused(saved(tmp_path, LORA, lora_adapter_metadata=text), message)


# --- refusals ---------------------------------------------------------------------------------------------------------

A, B = f"transformer.{QUERY}.lora_A.weight", f"transformer.{QUERY}.lora_B.weight"
ONE = {A: torch.ones(2, 24), B: torch.ones(24, 2)}
FLAT = "lycoris_transformer_blocks_0_attn1_to_q"
WRONG: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "A alone": ({A: ONE[A]}, (f"{A}: the layer's lora_B (lora_up) is missing",)),
    "B alone": ({B: ONE[B]}, (f"{B}: the layer's lora_A (lora_down) is missing",)),
    "alpha alone": (ONE | {"transformer.proj_out.alpha": torch.ones(())}, ("proj_out.alpha: the layer has no other part",)),
    "norms alone": ({f"transformer.{QUERY}.lora_magnitude_vector": torch.ones(24)}, ("only a low-rank change can have it",)),
    "ranks": (ONE | {B: torch.ones(24, 3)}, ("(2, 24) and (24, 3) make no product",)),
    "rank 0": ({A: torch.ones(0, 24), B: torch.ones(24, 0)}, (f"{A} is (0, 24), which is no matrix",)),
    "a vector": (ONE | {A: torch.ones(24)}, (f"{A} is (24,), which is no matrix",)),
    "width": ({A: torch.ones(2, 32), B: torch.ones(24, 2)}, ("a change of (24, 32), where the model has (24, 24)",)),
    "kernel": (
        {"patch_embed.proj.lora_A.weight": torch.ones(2, 16, 1, 1), "patch_embed.proj.lora_B.weight": torch.ones(24, 2)},
        ("has kernels of (16, 1, 1), where the model's are (4, 2, 2)",),
    ),
    "blocks": (
        {name.replace("blocks.0", "blocks.12"): tensor for name, tensor in ONE.items()},
        ("the model has no layer transformer_blocks.12.attn1.to_q",),
    ),
    "text encoder": (
        ONE | {"text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(1, 1)},
        ("text_encoder.layers.0.q_proj.lora_A.weight: a text encoder's, which sana does not adapt",),
    ),
    "kohya's text encoder": (ONE | {"lora_te_layers_0.alpha": torch.ones(())}, ("lora_te_layers_0.alpha: a text encoder's",)),
    "unknown part": (ONE | {f"transformer.{QUERY}.oft_r": torch.ones(1)}, (f"{QUERY}.oft_r: no part of a SANA's adapter",)),
    "bias": (ONE | {f"transformer.{QUERY}.lora_B.bias": torch.ones(24)}, ("lora_B.bias: no part of a SANA's adapter",)),
    "norm": (ONE | {f"transformer.{QUERY}.w_norm": torch.ones(24)}, ("w_norm: no part",)),
    "depthwise": (
        {"transformer.transformer_blocks.0.ff.conv_depth.lora_A.weight": torch.ones(1, 1, 3, 3)},
        ("sana does not adapt the depthwise convolution",),
    ),
    "another model": (
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 2)},
        ("is an adapter, but not of a SANA's transformer", "single_transformer_blocks.0"),
    ),
    "a whole model": ({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2, 2)}, ("is no adapter: its tensors are called",)),
    "nothing": ({}, ("holds no tensors",)),
    "twice": (
        ONE | {f"transformer.{QUERY}.lora_down.weight": ONE[A]},
        ("is the same part of the same layer",),
    ),
    "two adapters": (
        {f"base_model.model.{QUERY}.lora_A.{name}.weight": ONE[A] for name in ("default", "other")},
        ("lora_A.other.weight: base_model.model",),
    ),
    "twice in other names": (
        ONE | {f"{FLAT}.diff": torch.ones(24, 24)},
        (f"another tensor changes {QUERY} too",),
    ),
    "fused and not": (
        ONE | {"blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 24), "blocks.0.attn.qkv.lora_B.weight": torch.ones(72, 2)},
        (f"another tensor changes {QUERY} too",),
    ),
    "fused of another width": (
        {"blocks.0.attn.qkv.lora_A.weight": torch.ones(2, 24), "blocks.0.attn.qkv.lora_B.weight": torch.ones(73, 2)},
        ("73 rows do not split into 3 layers",),
    ),
    "alpha": (ONE | {f"transformer.{QUERY}.alpha": torch.ones(2)}, ("alpha is (2,), not one number",)),
    "magnitude": (ONE | {f"transformer.{QUERY}.lora_magnitude_vector": torch.ones(2)}, ("is (2,), not (24,)",)),
    "half a LoKr": ({f"{FLAT}.lokr_w1": torch.ones(2, 2)}, ("the layer's lokr_w2_a is missing",)),
    "a LoKr's ranks": (
        {f"{FLAT}.lokr_w1": torch.ones(2, 2), f"{FLAT}.lokr_w2_a": torch.ones(12, 2), f"{FLAT}.lokr_w2_b": torch.ones(3, 12)},
        ("(12, 2) and (3, 12) make no product",),
    ),
    "a LoKr of another size": (
        {f"{FLAT}.lokr_w1": torch.ones(2, 2), f"{FLAT}.lokr_w2": torch.ones(2, 2)},
        ("a change of (4, 4), where the model has (24, 24)",),
    ),
    "an absurd LoKr": (
        {f"{FLAT}.lokr_w1": torch.ones(999, 999), f"{FLAT}.lokr_w2": torch.ones(999, 999)},
        ("larger than any SANA's layer",),
    ),
    "a LoKr's DoRA": (
        {f"{FLAT}.lokr_w1": torch.ones(2, 2), f"{FLAT}.lokr_w2": torch.ones(12, 12), f"{FLAT}.dora_scale": torch.ones(24, 1)},
        (f"{FLAT}.dora_scale: only a low-rank change can have it",),
    ),
    "a Tucker core": (
        {f"{FLAT}.lora_mid.weight": torch.ones(2, 2, 1, 1)} | ONE,
        ("lora_mid.weight: no part of a SANA's adapter",),
    ),
    "LoHa and LoKr": (
        {f"{FLAT}.lokr_w1": torch.ones(2, 2), f"{FLAT}.hada_w1_a": torch.ones(2, 2)},
        ("parts of two kinds",),
    ),
    "biases": ({f"{FLAT}.diff_b": torch.ones(24)}, ("diff_b: no part of a SANA's adapter",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_applied_is_named(kind: str, tmp_path: Path) -> None:
    tensors, parts = WRONG[kind]
    refused(saved(tmp_path, tensors), *parts)


def test_numbers_that_are_not_finite_or_quantised(tmp_path: Path) -> None:
    for number in (float("nan"), float("inf")):
        bad = ONE | {B: torch.full((24, 2), number)}
        assert A not in refused(saved(tmp_path, bad), "has NaN or infinity:", B)
    refused(saved(tmp_path, ONE | {A: torch.ones(2, 24).to(torch.int8)}), "is a tensor of int8", "quantised")
    refused(saved(tmp_path, ONE | {A: torch.ones(2, 24).to(torch.float8_e4m3fn)}), "float8", "quantised")
    huge = {A: torch.full((2, 24), 1e300, dtype=torch.float64), B: ONE[B]}
    refused(saved(tmp_path, huge), "has NaN or infinity:")


def test_an_alpha_that_contradicts_the_config(tmp_path: Path) -> None:
    packed = {f"transformer.{key}": value for key, value in {"r": 2, "lora_alpha": 4}.items()}
    alpha = {f"transformer.{QUERY}.alpha": torch.tensor(2.0)}
    refused(
        saved(tmp_path, ONE | alpha, lora_adapter_metadata=packed), "says a scale of 1, and", "metadata 2"
    )
    alpha = {f"transformer.{QUERY}.alpha": torch.tensor(4.0)}
    stored = read_adapter(saved(tmp_path, ONE | alpha, lora_adapter_metadata=packed), SHAPES)
    assert scales(stored) == [2.0]


def test_long_lists_are_cut(tmp_path: Path) -> None:
    message = refused(
        saved(tmp_path, {f"x{n}.lora_A.weight": torch.ones(1, 1) for n in range(50)}), "and 40 more"
    )
    assert len(message.splitlines()) == 13


def test_folders(tmp_path: Path) -> None:
    refused(tmp_path, "has no pytorch_lora_weights.safetensors, and no adapter_model.safetensors")
    torch.save(ONE, tmp_path / "adapter_model.bin")
    refused(tmp_path, "adapter_model.bin is a pickle", "convert it")
    refused(tmp_path / "adapter_model.bin", "is a pickle; adapters are read from safetensors alone")
    save_file(ONE, tmp_path / "own.safetensors")
    refused(tmp_path, "has no pytorch_lora_weights.safetensors", "own.safetensors")
    save_file(ONE, tmp_path / ADAPTER_WEIGHTS)
    assert read_adapter(tmp_path, SHAPES).path == tmp_path / ADAPTER_WEIGHTS
    save_file(ONE, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "has two adapters", "name one of its files")
    with pytest.raises(SanaError, match="gone.safetensors"):
        read_adapter(tmp_path / "gone.safetensors")


def test_hostile_files_give_one_message(tmp_path: Path) -> None:
    """Damaged headers, shapes, names, metadata: a message or changes of the model's shapes, never a traceback."""
    packed = {"transformer.r": 3, "transformer.lora_alpha": 3}
    whole = saved(tmp_path, FORMS["diffusers"][0], lora_adapter_metadata=packed).read_bytes()
    parts = ["lora_A.weight", "lora_B.weight", "alpha", "lora_magnitude_vector", "dora_scale", "diff"]
    parts += [f"lokr_w{n}{half}" for n in (1, 2) for half in ("", "_a", "_b")]
    parts += [f"hada_w{n}_{half}" for n in (1, 2) for half in "ab"]
    read = 0
    for seed in range(600):
        draw = random.Random(seed)
        path = tmp_path / "adapter.safetensors"
        if seed % 3 == 0:
            damaged = bytearray(whole)
            for _ in range(draw.randint(1, 20)):
                damaged[draw.randrange(min(len(damaged), draw.choice([8, 200, 3_000, 9**9])))] = (
                    draw.randrange(256)
                )
            path.write_bytes(damaged[: draw.choice([len(damaged)] * 3 + [draw.randrange(len(damaged))])])
        else:
            modules = [
                f"transformer.{QUERY}",
                FLAT,
                "lora_unet_blocks_0_attn_qkv",
                "blocks.0.attn.qkv",
                "proj_out",
            ]
            tensors = {}
            for _ in range(draw.randint(1, 6)):
                shape = [draw.choice([0, 1, 2, 3, 12, 24, 72]) for _ in range(draw.randint(0, 4))]
                tensors[f"{draw.choice(modules)}.{draw.choice(parts)}"] = torch.randn(shape)
            numbers: list[Any] = [
                2,
                0,
                -1,
                None,
                "x",
                [],
                {},
                {"to_q": 2},
                True,
                1e400,
                10**400,
                {"": None},
                {"\ud800": 1},
            ]
            config = {
                f"transformer.{key}": draw.choice(numbers)
                for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "bias")
            }
            saved(tmp_path, tensors, **({"lora_adapter_metadata": config} if seed % 3 == 1 else {}))
        try:
            stored = read_adapter(path, SHAPES if seed % 2 else None)
        except SanaError as error:
            assert 1 <= len(str(error).splitlines()) <= 13
            assert str(error).isprintable() or "\n" in str(error)
        else:
            read += 1
            assert stored.layers
    assert 0 < read < 600


def test_adapters_are_told_from_models_by_their_names(tmp_path: Path) -> None:
    for tensors, _ in FORMS.values():
        assert is_adapter_file(saved(tmp_path, tensors))
    assert not is_adapter_file(saved(tmp_path, {"proj_out.weight": torch.ones(1)}))
    assert not is_adapter_file(
        saved(tmp_path, ONE | {"base_model.model.x.base_layer.weight": torch.ones(1)})
    )  # unmerged
    (tmp_path / "bad.safetensors").write_bytes(bytes(8) + b"{")
    assert not is_adapter_file(tmp_path / "bad.safetensors")
    assert not is_adapter_file(tmp_path)
    save_file(ONE, tmp_path / ADAPTER_WEIGHTS)
    assert is_adapter_file(tmp_path)
