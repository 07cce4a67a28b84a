"""Convert the tensors of NVlabs/Sana to diffusers' names. It reads no file."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli.errors import SanaError
from sana_cli.model import positions
from sana_cli.weights.stored import StoredWeights, infer_config

MODULES = {  # as diffusers' conversion script has them
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "final_layer.linear": "proj_out",
}
MODULES_OF_A_BLOCK = {
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.inverted_conv.conv": "ff.conv_inverted",
    "mlp.depth_conv.conv": "ff.conv_depth",
    "mlp.point_conv.conv": "ff.conv_point",
}
FUSED = {  # one matrix to several, cut along its rows
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
NOT_THE_TRANSFORMER = ("pos_embed", "y_embedder.y_embedding", "logvar_linear.weight", "logvar_linear.bias")


def convert_official(tensors: Mapping[str, Tensor], path: Path) -> StoredWeights:
    """Convert NVlabs/Sana's names as diffusers' `scripts/convert_sana_to_diffusers.py` does.

    Raises:
        SanaError: a fused matrix does not split, or shapes leave a size open.
    """
    time = "time_embed" if any(name.startswith("cfg_embedder.") for name in tensors) else "time_embed.emb"
    modules = MODULES | {
        "t_embedder.mlp.0": f"{time}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{time}.timestep_embedder.linear_2",
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in NOT_THE_TRANSFORMER:
            continue
        module, _, leaf = name.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)(?:\.(.+))?", module)
        prefix, part = (f"transformer_blocks.{block[1]}", block[2] or "") if block else ("", "")
        if part in FUSED:
            parts = FUSED[part]
            if tensor.ndim == 0 or tensor.shape[0] % len(parts):
                raise SanaError(
                    f"{path}: {name} is {tuple(tensor.shape)}, which does not split into {len(parts)}"
                )
            for to, chunk in zip(parts, tensor.chunk(len(parts)), strict=True):
                renamed[f"{prefix}.{to}.{leaf}"] = chunk
        elif block:
            renamed[".".join(filter(None, (prefix, MODULES_OF_A_BLOCK.get(part, part), leaf)))] = tensor
        elif name == "final_layer.scale_shift_table":
            renamed["scale_shift_table"] = tensor
        else:
            renamed[f"{modules[module]}.{leaf}" if module in modules else name] = tensor
    known: dict[str, Any] = {}
    if "pos_embed" in tensors:
        known = _read_positions(tensors["pos_embed"], renamed["patch_embed.proj.weight"].shape[-1:], path)
    left_out = tuple(name for name in NOT_THE_TRANSFORMER if name in tensors)
    model = infer_config(renamed, path, **known)
    return StoredWeights("official", path, model, renamed, "the SANA that its shapes describe", left_out)


def _read_positions(buffer: Tensor, patch: tuple[int, ...], path: Path) -> dict[str, Any]:
    """`sample_size` and `interpolation_scale` from the official `pos_embed` (1, N, D).

    A model without positions has zeros there. The second token is one column on, at the angle
    1 / interpolation_scale. The buffer has the sine and cosine of that angle.

    Raises:
        SanaError: it has another shape or other positions.
    """
    side = math.isqrt(buffer.shape[1]) if buffer.ndim == 3 else 0
    if side == 0 or side * side != buffer.shape[1] or buffer.shape[2] % 4:
        raise SanaError(f"{path}: pos_embed is {tuple(buffer.shape)}, not (1, side * side, width)")
    known: dict[str, Any] = {"sample_size": side * math.prod(patch)}
    if buffer.is_meta or not buffer.any():
        return known
    table, dim = buffer[0].float(), buffer.shape[2]
    angle = math.atan2(float(table[1, 0]), float(table[1, dim // 4])) if side > 1 else 1.0
    for digits in range(4):  # bf16 keeps three digits of the angle, and the scale is a round number
        scale = round(1 / angle, digits) if angle > 0 else 0.0
        if scale > 0 and torch.allclose(table, positions(side, side, side, scale, dim), atol=0.01):
            return known | {"interpolation_scale": scale}
    raise SanaError(
        f"{path}: pos_embed is neither zeros nor sine-cosine positions, which is all that SANA has"
    )
