"""SANAs as others save them: official names, the lesson's file, trainers' files."""

import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sana_cli.commands.inspect import InspectOptions, inspect
from sana_cli.config.keys import Architecture
from sana_cli.errors import SanaError
from sana_cli.model import build
from sana_cli.weights import checkpoint, configs
from sana_cli.weights.stored import StoredWeights

diffusers = pytest.importorskip("diffusers")
# layers, self-attention heads of 32, cross-attention heads and their width, norm of q and k,
# guidance, parameters (from diffusers' conversion script)
PUBLISHED = {
    "Sana 0.6B": (28, 36, 16, 72, False, False, 591_747_872),
    "Sana 1.6B": (20, 70, 20, 112, False, False, 1_604_462_752),
    "Sana 1.5 1.6B": (20, 70, 20, 112, True, False, 1_604_641_952),
    "Sana 1.5 4.8B": (60, 70, 20, 112, True, False, 4_721_825_952),
    "Sana-Sprint 0.6B": (28, 36, 16, 72, True, True, 593_501_216),
    "Sana-Sprint 1.6B": (20, 70, 20, 112, True, True, 1_610_237_472),
}


def published(name: str, **fields: Any) -> Architecture:
    layers, heads, cross_heads, cross_dim, qk_norm, guidance, _ = PUBLISHED[name]
    shape = {
        "in_channels": 32, "patch_size": 1, "sample_size": 32, "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": 32, "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": cross_dim,
        "caption_channels": 2304, "qk_norm": "rms_norm_across_heads" if qk_norm else None,
        "guidance_embeds": guidance,
    }  # fmt: skip
    return Architecture.model_validate(shape | fields)


def official(state: Mapping[str, Tensor], sprint: bool) -> dict[str, Tensor]:
    """A state dict renamed as in NVlabs/Sana (`sana_multi_scale.py`, `sana_blocks.py`)."""
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
    for block in range(
        sum(1 for name in state if re.fullmatch(r"transformer_blocks\.\d+\.scale_shift_table", name))
    ):
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
    """Tensors of these shapes that take no space in memory or in a file: one zero, expanded."""
    return {name: torch.zeros((), dtype=dtype).expand(tensor.shape) for name, tensor in tensors.items()}


def extras(name: str, side: int = 32) -> dict[str, Tensor]:
    width = 32 * PUBLISHED[name][1]
    return {
        "pos_embed": torch.zeros(()).expand(1, side * side, width),
        "y_embedder.y_embedding": torch.zeros(()).expand(300, 2304),
        "logvar_linear.weight": torch.zeros(1, width),
        "logvar_linear.bias": torch.zeros(1),
    }


def same(ours: Any, theirs: Any, guidance: bool = False, time_scale: float = 1.0) -> float:
    """The largest difference between two models' outputs, relative to their largest output."""
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


def reference(config: Architecture) -> Any:
    """diffusers' model with random weights, so that every part affects the output."""
    torch.manual_seed(0)
    model = diffusers.SanaTransformer2DModel.from_config(configs.diffusers_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


PIXELS = Architecture(
    in_channels=1, sample_size=16, patch_size=8, num_layers=2, num_attention_heads=3, attention_head_dim=8,
    num_cross_attention_heads=2, cross_attention_head_dim=12, caption_channels=128,
)  # fmt: skip


def lesson_file(path: Path, theirs: Any, null_seed: int = 1, **changes: Any) -> Path:
    """A file as the lesson's `save` writes it (`training/image/train.py`)."""
    state = {
        f"_score_network.{k}".replace(".attn2.", ".cross_attn."): t for k, t in theirs.state_dict().items()
    }
    params = {
        name: getattr(PIXELS, name)
        for name in ("patch_size", "in_channels", "caption_channels", "attention_head_dim",
        "num_attention_heads", "dropout",
                     "num_cross_attention_heads", "cross_attention_head_dim", "mlp_ratio", "num_layers")
    }  # fmt: skip
    params |= {"input_spatial_size": 16, "out_channels": 1, "cross_attention_dim": PIXELS.inner_dim}
    optimizer = torch.optim.Adam(theirs.parameters(), 2e-4)
    generator = torch.Generator().manual_seed(null_seed)
    content = {
        "step": 9999,
        "model_state_dict": state
        | {"_unconditional_context.y_embedding": torch.randn(300, 128, generator=generator)},
        "num_optimizers": 1,
        "optimizer_state_dicts": [optimizer.state_dict()],
        "loss": torch.tensor(0.1),
        "config": {"diffusion": {"score_network": {"params": params}}},
    }
    torch.save(content | changes, path)
    return path


class Payload:
    """A pickle that runs code when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.proof}",)


# the smallest model of a published width, which its tensors reveal
CONFIG = Architecture(
    in_channels=4, patch_size=1, sample_size=8, num_layers=1, num_attention_heads=36, attention_head_dim=32,
    num_cross_attention_heads=16, cross_attention_head_dim=72, caption_channels=8,
)  # fmt: skip
SHAPES = official(build(CONFIG, seed=None).state_dict(), sprint=False)
OURS = build(CONFIG, seed=None).state_dict()


def filled(value: float, like: Mapping[str, Tensor] = SHAPES) -> dict[str, Tensor]:
    """Weights that are all one number, which identifies the set and takes no space."""
    return {
        name: torch.tensor(value, dtype=torch.bfloat16).expand(tensor.shape) for name, tensor in like.items()
    }


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


RAW, AVERAGE = filled(1), filled(2)


def random_states() -> dict[str, Any]:
    """Random states as NVlabs/Sana's `diffusion/utils/checkpoint.py` saves them."""
    return {
        "torch": torch.get_rng_state(),
        "torch_cuda": [torch.get_rng_state()],
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "generator": torch.Generator(device="cpu").manual_seed(42).get_state(),
    }


def optimizer_states() -> dict[str, Any]:
    """States of AdamW, bitsandbytes' AdamW8bit and NVlabs/Sana's CAME8bit (chunked)."""
    bytes_ = torch.zeros(4, dtype=torch.uint8)
    parameter = torch.nn.Parameter(torch.ones(2))
    adamw = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    adamw.step()
    state = {
        0: {"step": 1, "state1": bytes_, "qmap1": torch.zeros(256), "absmax1": torch.zeros(1)},
        1: {
            "exp_avg": [{"data": bytes_, "scale": torch.tensor(1.0), "min": torch.tensor(0.0)}],
            "RMS": torch.tensor(0.1),
        },
        2: {"exp_avg_sq_row": torch.zeros(2), "exp_avg_res_col": torch.zeros(2), "lr": np.float64(1e-4)},
    }
    return {
        "state": state,
        "param_groups": [{"betas": (0.9, 0.999, 0.9999), "params": [0, 1, 2]}],
        "adamw": adamw.state_dict(),
    }


def trainer_file(path: Path, old: bool = False, **more: Any) -> Path:
    """A file as `save_checkpoint_ddp` writes it."""
    content = {
        "state_dict": RAW, "optimizer": optimizer_states(), "scheduler": {"base_lrs": [1e-4],
        "last_epoch": np.int64(3)},
        "epoch": 1, "step": 10, "rng_state": random_states(),
    }  # fmt: skip
    torch.save(content | more, path, _use_new_zipfile_serialization=not old)
    return path


def value(weights: StoredWeights) -> float:
    """The number that a set of weights was filled with."""
    numbers = {float(tensor.flatten()[0]) for tensor in weights.tensors.values()}
    assert len(numbers) == 1
    return numbers.pop()


def refused(path: Path, *parts: str) -> str:
    """The message for a path: equal from each command, with these parts and a next step."""
    messages = set()
    for act in (lambda: checkpoint.load_transformer(path), lambda: inspect(InspectOptions(str(path)))):
        with pytest.raises(SanaError) as caught:
            act()
        messages.add(str(caught.value))
    assert len(messages) == 1, messages
    message = messages.pop()
    assert all(part in message for part in (str(path), *parts)), message
    assert len(message.splitlines()) > 1, message
    return message
