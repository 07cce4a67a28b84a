"""Names of tensors in others' adapter files: which layer of a SANA each belongs to, and which part it is.

It knows no tensors: `adapters.py` reads them.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache

from sana_cli.weights.official import FUSED, MODULES, MODULES_OF_A_BLOCK

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_OF_A_BLOCK = (
    *(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in _ATTENTION),
    "ff.conv_inverted",
    "ff.conv_depth",
    "ff.conv_point",
)
_TIME = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")
_OUTSIDE = (
    "patch_embed.proj",
    *(f"time_embed.emb.{layer}" for layer in _TIME),
    *(f"time_embed.{layer}" for layer in _TIME),  # where guidance is embedded too
    *(f"time_embed.guidance_embedder.linear_{number}" for number in (1, 2)),
    "time_embed.linear",
    *(f"caption_projection.linear_{number}" for number in (1, 2)),
    "proj_out",
)
_OFFICIAL = {
    "t_embedder.mlp.0": (f"time_embed.emb.{_TIME[0]}", f"time_embed.{_TIME[0]}"),
    "t_embedder.mlp.2": (f"time_embed.emb.{_TIME[1]}", f"time_embed.{_TIME[1]}"),
    **{official: (ours,) for official, ours in MODULES.items()},
}
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "model.",
)
_FORMS = {"base_model.model.": "peft", "transformer.": "diffusers"} | dict.fromkeys(_PREFIXES[1:3], "ComfyUI")
_FLAT_PREFIXES = ("lycoris_", "lora_unet_", "lora_transformer_", "lora_")
_TEXT = re.compile(
    r"(base_model\.model\.)?(text_encoder|text_model|cond_stage|lora_te|lycoris_te|te\d?\.|te\d?_)"
)
_PARTS = (  # the end of a name, what it is
    (r"\.lora_A(\.(?!weight)\w+)?\.weight", "A"),
    (r"\.lora_B(\.(?!weight)\w+)?\.weight", "B"),
    (r"\.lora_down\.weight|\.lora\.down\.weight|\.lora_linear_layer\.down\.weight", "A"),
    (r"\.lora_up\.weight|\.lora\.up\.weight|\.lora_linear_layer\.up\.weight", "B"),
    (r"\.lora_magnitude_vector(\.\w+)?(\.weight)?", "magnitude"),
    (r"\.dora_scale", "dora_scale"),
    (r"\.alpha", "alpha"),
    (r"\.(lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|diff)", None),
)  # fmt: skip
_ENDS = tuple((re.compile(rf"(?P<module>.{{1,300}}?)(?:{end})"), part) for end, part in _PARTS)


@dataclass(frozen=True)
class Named:
    """What a tensor's name says."""

    layers: tuple[str, ...]  # layers that may be meant: of several, the model has one
    cut: bool  # all of these are meant: one matrix is cut along its rows into theirs
    part: str  # A, B, alpha, magnitude, dora_scale, lokr_w1 ...
    module: str  # the layer, as the file calls it, without a prefix of its form
    form: str  # in words


def is_of_text_encoder(name: str) -> bool:
    """Whether a tensor of this name adapts a text encoder."""
    return _TEXT.match(name) is not None


def parse(name: str, layers: Collection[str] | None = None) -> Named | None:
    """What a tensor's name says. None: it is no part of an adapter of a SANA's layer.

    Args:
        name: the tensor's name.
        layers: the model's own layers, by which to decide where a name alone does not.
    """
    for end, part in _ENDS:
        if found := end.fullmatch(name):
            module = found["module"]
            own = part or name[len(module) + 1 :]
            if meant := _meant(module):
                names, cut, form, rest = meant
                there = tuple(name for name in names if layers is not None and name in layers)
                return Named(names if cut else (there or names)[:1], cut, own, rest, form)
    return None


def _meant(module: str) -> tuple[tuple[str, ...], bool, str, str] | None:
    """Our layers, whether a matrix is cut into theirs, the form, and the module's name without a prefix."""
    rest, form = module, "diffusers, without its prefix"
    while prefix := next((prefix for prefix in _PREFIXES if rest.startswith(prefix)), None):
        if rest == module:
            form = _FORMS.get(prefix, form)
        rest = rest.removeprefix(prefix)
    if found := _dotted(rest):
        ours = found[0][0] == rest or rest.startswith("transformer_blocks.")
        return *found, form if ours else "NVlabs/Sana", rest
    flat = {
        (found, prefix)
        for prefix in _FLAT_PREFIXES
        if module.startswith(prefix) and (found := _flattened(module.removeprefix(prefix)))
    }
    if len(flat) == 1:
        found, prefix = flat.pop()
        return *found, "LyCORIS" if prefix == "lycoris_" else "kohya", module.removeprefix(prefix)
    return None


def _dotted(name: str) -> tuple[tuple[str, ...], bool] | None:
    """Our layers of a dotted name, ours or NVlabs/Sana's."""
    if name in _OUTSIDE:
        return (name,), False
    if name in _OFFICIAL:
        return _OFFICIAL[name], False
    block = re.fullmatch(r"(transformer_blocks|blocks)\.(\d{1,5})\.(.+)", name)
    return None if block is None else _in_block(block[1], str(int(block[2])), block[3])


def _in_block(blocks: str, number: str, part: str) -> tuple[tuple[str, ...], bool] | None:
    if blocks == "transformer_blocks":
        parts: tuple[str, ...] = (part,) if part in _OF_A_BLOCK else ()
    else:
        official = MODULES_OF_A_BLOCK.get(part)
        parts = FUSED.get(part) or ((official,) if official in _OF_A_BLOCK else ())
    return (tuple(f"transformer_blocks.{number}.{name}" for name in parts), len(parts) > 1) if parts else None


@cache
def _flat_names() -> dict[str, tuple[str, str]]:
    """Names of blocks' parts with _ for each dot: those of ours, and those of NVlabs/Sana."""
    ours = {name.replace(".", "_"): ("transformer_blocks", name) for name in _OF_A_BLOCK}
    names = (*MODULES_OF_A_BLOCK, *FUSED)
    return ours | {name.replace(".", "_"): ("blocks", name) for name in names}


def _flattened(name: str) -> tuple[tuple[str, ...], bool] | None:
    """Our layers of a name in which each dot is a _."""
    for whole in (*_OUTSIDE, *_OFFICIAL):
        if whole.replace(".", "_") == name:
            return _dotted(whole)
    block = re.fullmatch(r"(transformer_blocks|blocks)_(\d{1,5})_(.+)", name)
    if block is None or block[3] not in _flat_names():
        return None
    blocks, part = _flat_names()[block[3]]
    return _in_block(blocks, str(int(block[2])), part) if blocks == block[1] else None


def pattern_of(patterns: Collection[str], layer: str) -> str | None:
    """The first of peft's patterns that fits a layer: its whole name, or an end of it from a dot on."""
    for pattern in patterns:
        own = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if layer == own or (layer.endswith(f".{own}") and not pattern.startswith("^")):
            return pattern
    return None


def odd_patterns(patterns: Collection[str]) -> Iterator[str]:
    """Those of peft's patterns that are regular expressions and no names."""
    for pattern in patterns:
        if not re.fullmatch(r"\^?[\w.\\-]+\$?", pattern) or re.search(r"\\[^.]", pattern):
            yield pattern
