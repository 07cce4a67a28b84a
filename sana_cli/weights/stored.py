"""A transformer's weights as stored, the config that shapes imply, and a check against a model.

It opens no file.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli.choices import PredictionType
from sana_cli.config.keys import Architecture
from sana_cli.errors import SanaError, listed
from sana_cli.runtime import hub
from sana_cli.weights import pickles, strangers
from sana_cli.weights.configs import PUBLISHED_PREDICTION, validated


@dataclass(frozen=True)
class StoredWeights:
    """A transformer's weights, of any origin."""

    origin: str  # diffusers, official or lesson
    path: Path
    model: Architecture
    tensors: Mapping[str, Tensor]  # by diffusers' names; memory-mapped where the file allows
    compared_to: str  # what they must fit, as a message calls it
    left_out: tuple[str, ...] = ()  # what else the file holds
    null_caption: Tensor | None = None  # (L, D), if the file has its own
    choice: str | None = None  # which of the file's sets of weights this is, if it has several
    prediction_type: PredictionType = PUBLISHED_PREDICTION
    other_parts: tuple[str, ...] = ()  # whole models in the file, each with its number of tensors

    @cached_property
    def sha256(self) -> str:
        """`hub.hash_tensors` of the tensors. It takes seconds for gigabytes."""
        return hub.hash_tensors(self.tensors)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The types that the tensors are stored in, such as bfloat16."""
        return tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}))


_SELF_HEAD_DIM = 32  # of every published model
_CROSS_HEADS = {1152: 16, 2240: 20}


def infer_config(tensors: Mapping[str, Tensor], path: Path, **known: Any) -> Architecture:
    """Infer a config from tensors' names (diffusers') and shapes.

    `known` has fields that these do not determine. Tensors may be on `meta`.

    Raises:
        SanaError: a tensor is missing or has an impossible shape, or the number of heads is
            unknown.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in tensors:
            raise SanaError(f"{path} does not look like a whole SANA:", f"  missing: {name}")
        found = tuple(tensors[name].shape)
        if len(found) != dimensions or 0 in found:
            raise SanaError(f"{path}: {name} is {found}, where {dimensions} dimensions are expected")
        return found

    def has(part: str) -> bool:
        return any(part in name for name in tensors)

    patch = shape("patch_embed.proj.weight", 4)  # (width, channels, patch, patch)
    width = patch[0]
    if "num_attention_heads" not in known:
        known |= _published_heads(width, path)
    hidden = shape("transformer_blocks.0.ff.conv_point.weight", 4)[1]
    ratio = 2.5 if int(2.5 * width) == hidden else hidden / width
    known = {"sample_size": 32} | known
    numbers = (re.match(r"transformer_blocks\.(\d{1,6})\.", name) for name in tensors)
    blocks = {int(number[1]) for number in numbers if number}
    return validated(
        {
            "in_channels": patch[1],
            "patch_size": patch[2],
            "num_layers": len(blocks),
            "caption_channels": shape("caption_projection.linear_1.weight", 2)[1],
            "mlp_ratio": ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf),
            "attention_bias": has("attn1.to_q.bias"),
            "qk_norm": "rms_norm_across_heads" if has("attn1.norm_q.") else None,
            "guidance_embeds": has("time_embed.guidance_embedder."),
            **known,
        },
        path,
    )


def _published_heads(width: int, path: Path) -> dict[str, int]:
    """The attention heads of the published models of this width. Shapes do not show them.

    Raises:
        SanaError: no published model has this width.
    """
    heads = _CROSS_HEADS.get(width)
    if heads is None:
        raise SanaError(
            f"{path}: how many attention heads its width of {width} is split into cannot be told from shapes",
            f"known are the published widths {' and '.join(map(str, _CROSS_HEADS))}; "
            "for others, put diffusers' config.json beside it",
        )
    return {
        "num_attention_heads": width // _SELF_HEAD_DIM,
        "attention_head_dim": _SELF_HEAD_DIM,
        "num_cross_attention_heads": heads,
        "cross_attention_head_dim": width // heads,
    }


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: Path, compared_to: str
) -> None:
    """Refuse tensors that have other names or shapes than those expected, which may be on `meta`.

    Raises:
        SanaError: lists what is missing, unexpected or of another shape.
    """
    if problems := list(_misfits(found, {name: tuple(tensor.shape) for name, tensor in expected.items()})):
        raise SanaError(f"{where} does not fit {compared_to}:", *listed(problems))


def _misfits(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    yield from (f"missing: {name} {shape}" for name, shape in expected.items() if name not in found)
    yield from (
        f"unexpected: {name} {tuple(tensor.shape)}" for name, tensor in found.items() if name not in expected
    )
    for name, shape in expected.items():
        if name in found and tuple(found[name].shape) != shape:
            yield f"{name} is {tuple(found[name].shape)}, not {shape}"


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def plain_tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a dictionary, without its other values.

    Raises:
        SanaError: one is quantised, sparse, or not of floating-point numbers.
    """
    given = {str(name): value for name, value in pickles.items(content)}
    tensors = {name: value.detach() for name, value in given.items() if isinstance(value, Tensor)}
    strangers.refuse_packed(tensors, path)
    for name, tensor in tensors.items():
        odd = tensor.is_nested or tensor.is_quantized or tensor.is_meta
        dense = tensor.layout == torch.strided and not odd
        if not dense or tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            quantised = re.match(r"float8|float4|q?u?int\d", kind)
            raise SanaError(
                f"{path}: {name} is a tensor of {kind}{'' if dense else ', not dense'}; "
                "weights are float32, bfloat16, float16 or float64",
                *([f"it is quantised, which is not read; {strangers.PLAIN_COPY}"] if quantised else []),
            )
    return tensors
