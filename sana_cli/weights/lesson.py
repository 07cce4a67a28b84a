"""Convert the weights of mindiffusion's lesson 37 to diffusers' form. It reads no file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_cli.errors import SanaError
from sana_cli.model import TIMESTEP_CHANNELS, build
from sana_cli.weights.stored import StoredWeights, check_tensors, infer_config, plain_tensors

_PREFIX = "_score_network."
_NULL_CAPTION = "_unconditional_context.y_embedding"
_HEADS = (  # which shapes do not show
    "num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim"
)  # fmt: skip


def is_lesson(content: Mapping[Any, Any]) -> bool:
    """Whether a pickle's content is a file of the lesson."""
    state = content.get("model_state_dict")
    return isinstance(state, dict) and any(str(name).startswith(_PREFIX) for name in state)


def convert_lesson(content: Mapping[str, Any], path: Path) -> StoredWeights:
    """Convert the lesson's network, which predicts data - noise at time 1 - sigma.

    The sign goes into the last layer, the time into the first layer of its embedding. The
    lesson does not multiply its time by 1000, so `timestep_scale` is 0.001.

    Raises:
        SanaError: the file lacks the lesson's config, or its tensors do not fit it.
    """
    state = plain_tensors(content["model_state_dict"], path)
    tensors = {
        name.removeprefix(_PREFIX).replace(".cross_attn.", ".attn2."): tensor
        for name, tensor in state.items()
        if name.startswith(_PREFIX)
    }
    try:
        params = content["config"]["diffusion"]["score_network"]["params"]
        known = {name: params[name] for name in _HEADS}
        known["sample_size"] = params.get("input_spatial_size", 32)
    except (KeyError, TypeError, AttributeError) as error:
        raise SanaError(
            f"{path} has a model_state_dict, but not the lesson's config beside it",
            "its number of attention heads stands in config.diffusion.score_network.params",
        ) from error
    config = infer_config(tensors, path, **known, timestep_scale=0.001)
    compared_to = "the model in its config"
    check_tensors(tensors, build(config, seed=None).state_dict(), path, compared_to)
    first = "time_embed.emb.timestep_embedder.linear_1.weight"
    tensors[first] = _of_reversed_time(tensors[first])
    for name in ("proj_out.weight", "proj_out.bias"):
        tensors[name] = -tensors[name]
    left_out = tuple(name for name in state if not name.startswith(_PREFIX))
    null = state.get(_NULL_CAPTION)  # (L, D)
    if null is None or null.ndim != 2 or null.shape[1] != config.caption_channels or len(null) == 0:
        null = None
    return StoredWeights("lesson", path, config, tensors, compared_to, left_out, null)


def _of_reversed_time(weight: Tensor) -> Tensor:
    """The first layer of a time embedding (D, 256) for input s, from that for input 1 - s.

    With frequencies f its columns rotate, as
    cos((1 - s) f) = cos f cos(s f) + sin f sin(s f),
    sin((1 - s) f) = sin f cos(s f) - cos f sin(s f).
    """
    half = TIMESTEP_CHANNELS // 2
    f = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float64))
    cosine, sine = weight.double().split(half, dim=1)  # (D, 128) each
    rotated = cosine * f.cos() + sine * f.sin(), cosine * f.sin() - sine * f.cos()
    return torch.cat(rotated, dim=1).to(weight.dtype)
