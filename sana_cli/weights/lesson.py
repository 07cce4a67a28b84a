"""The lesson's files in diffusers' names."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sana_cli.errors import SanaError
from sana_cli.model import TIMESTEP_CHANNELS, build
from sana_cli.weights.stored import StoredWeights, check_tensors, infer, plain_tensors

LESSON_PREFIX = "_score_network."
_LESSON_NULL = "_unconditional_context.y_embedding"


def lesson(content: Mapping[str, Any], path: Path) -> StoredWeights:
    """The lesson's network as ours: it predicts data - noise at time 1 - sigma, told as it is rather than times 1000.

    The sign goes into the last layer. The time goes into the first layer of its embedding: with frequencies f,
    cos((1 - s) f) = cos f cos(s f) + sin f sin(s f) and sin((1 - s) f) = sin f cos(s f) - cos f sin(s f), so that its
    columns are rotated; `timestep_scale` 0.001 undoes the 1000.
    """
    state = plain_tensors(content["model_state_dict"], path)
    tensors = {
        name.removeprefix(LESSON_PREFIX).replace(".cross_attn.", ".attn2."): tensor
        for name, tensor in state.items()
        if name.startswith(LESSON_PREFIX)
    }
    try:
        params = content["config"]["diffusion"]["score_network"]["params"]
        names = ("num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim")
        known = {name: params[name] for name in names} | {"sample_size": params.get("input_spatial_size", 32)}
    except (KeyError, TypeError, AttributeError) as error:
        raise SanaError(
            f"{path} has a model_state_dict, but not the lesson's config beside it",
            "its number of attention heads stands in config.diffusion.score_network.params",
        ) from error
    config, compared_to = infer(tensors, path, **known, timestep_scale=0.001), "the model in its config"
    check_tensors(tensors, build(config, seed=None), path, compared_to)
    half, first = TIMESTEP_CHANNELS // 2, "time_embed.emb.timestep_embedder.linear_1.weight"
    frequency = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float64))
    cosine, sine = tensors[first].double().split(half, dim=1)  # (D, 128) each
    turned = cosine * frequency.cos() + sine * frequency.sin(), cosine * frequency.sin() - sine * frequency.cos()
    tensors[first] = torch.cat(turned, dim=1).to(tensors[first].dtype)
    for name in ("proj_out.weight", "proj_out.bias"):
        tensors[name] = -tensors[name]
    left_out = tuple(name for name in state if not name.startswith(LESSON_PREFIX))
    null = state.get(_LESSON_NULL)
    if null is None or null.ndim != 2 or null.shape[1] != config.caption_channels or len(null) == 0:
        null = None
    return StoredWeights("lesson", path, config, tensors, compared_to, left_out, null)
