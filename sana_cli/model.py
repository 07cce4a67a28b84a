"""The SANA transformer (arXiv 2410.10629): the published block and nothing else.

It maps a noisy image or latent of any size that the patch divides, caption states and a timestep to a
prediction. What it predicts is the objective's matter. It knows neither rectified flow (`flow.py`), nor
where captions come from (`text.py`), nor files (`weights/`). Parameters have the names and shapes of
diffusers' `SanaTransformer2DModel`. Quicker forms of the same arithmetic are in `kernels.py`.

Shapes: B batch, K distinct captions in it, C channels, H W height and width of the sample, p patch,
N = (H/p)(W/p) tokens, D = heads * head_dim inner width, d head_dim, L caption tokens,
h = int(mlp_ratio * D) hidden width of the Mix-FFN.
"""

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sana_cli import kernels
from sana_cli.config.keys import Architecture
from sana_cli.kernels import Captions

TABLE = "scale_shift_table"
TIMESTEP_CHANNELS = 256
MASKED = -10000.0  # added to the scores of padding; finite: a row without caption tokens gives no NaN


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 and cast back."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


@lru_cache(maxsize=4)
def positions(height: int, width: int, base: int, interpolation_scale: float, dim: int) -> Tensor:
    """Sine-cosine positions of a grid of tokens, (height * width, dim): half for the column, half for the row.

    Rows and columns are scaled to the trained grid of `base` x `base` tokens and divided by
    `interpolation_scale` (NVlabs/Sana `get_2d_sincos_pos_embed`, diffusers `embeddings.py`). Float64 inside.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    row, column = (
        torch.arange(count, dtype=torch.float32) / (count / base) / interpolation_scale
        for count in (height, width)
    )
    angles = [
        column.double()[None, :, None].expand(height, -1, 1) * frequency,
        row.double()[:, None, None].expand(-1, width, 1) * frequency,
    ]
    return (
        torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=-1)
        .float()
        .flatten(0, 1)
    )


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens.

    No positions are added (NoPE): the Mix-FFN's convolution sees where tokens are. Only the published 2K and
    4K models, which have an `interpolation_scale`, add fixed ones.
    """

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Conv2d(
            config.in_channels, config.inner_dim, config.patch_size, stride=config.patch_size
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)  # (B, D, H/p, W/p)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2).contiguous()  # (B, N, D); all blocks would go on with its strides
        scale = self.config.interpolation_scale
        if scale is None:
            return x
        base = self.config.sample_size // self.config.patch_size
        return (x + positions(height, width, base, scale, x.shape[-1]).to(x.device)).to(x.dtype)


class TwoLayer(nn.Module):
    """Linear, activation, Linear: the shape of every embedder here."""

    def __init__(self, in_features: int, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, dim)
        self.activation = activation
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.applied(self.linear_2, self.activation(kernels.applied(self.linear_1, x)))


def sinusoid(timestep: Tensor, channels: int = TIMESTEP_CHANNELS) -> Tensor:
    """[cos(t f), sin(t f)] with f = 10000^(-i / (channels/2)), in float32: (B,) -> (B, channels)."""
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[:, None] * torch.exp(-math.log(10000.0) / half * index)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """A level of names that diffusers has between `time_embed` and its embedder."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayer(TIMESTEP_CHANNELS, dim, nn.SiLU())


class TimeEmbed(nn.Module):
    """adaLN-single: one projection of the timestep modulates all blocks, which add their `scale_shift_table`.

    Returns the six modulations (B, 6, D) and the embedding (B, D), which the final norm uses. Models whose
    guidance scale is an input (SANA-Sprint) add its embedding to the timestep's.
    """

    def __init__(self, dim: int, guidance_embeds: bool) -> None:
        super().__init__()
        self.guidance_embedder: TwoLayer | None = None
        if guidance_embeds:
            self.timestep_embedder = TwoLayer(TIMESTEP_CHANNELS, dim, nn.SiLU())
            self.guidance_embedder = TwoLayer(TIMESTEP_CHANNELS, dim, nn.SiLU())
        else:
            self.emb = TimestepEmbedder(dim)
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.guidance_embedder is None:
            embedded = self.emb.timestep_embedder(sinusoid(timestep).to(dtype))
        else:
            assert guidance is not None
            embedded = self.timestep_embedder(sinusoid(timestep).to(dtype))
            embedded = embedded + self.guidance_embedder(sinusoid(guidance).to(dtype))  # (B, D)
        modulation = rearrange(self.linear(F.silu(embedded)), "b (six d) -> b six d", six=6)
        return modulation, embedded


class LinearAttention(nn.Module):
    """ReLU linear self-attention (paper section 2.2): relu(q) (relu(k)^T v) / (relu(q) sum relu(k)).

    Sums are in float32.

    Matrix products are associative: with fewer tokens than `head_dim`, (relu(q) relu(k)^T) v is cheaper.
    """

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        dim = config.inner_dim
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(dim, dim, bias=config.attention_bias)
        self.to_k = nn.Linear(dim, dim, bias=config.attention_bias)
        self.to_v = nn.Linear(dim, dim, bias=config.attention_bias)
        self.norm_q = RMSNorm(dim, eps=1e-5) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps=1e-5) if config.qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(config.dropout)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = kernels.joined(x, self.to_q, self.to_k, self.to_v)  # (B, N, D) each
        q, k = self.norm_q(q), self.norm_k(k)
        with torch.autocast(x.device.type, enabled=False):  # half-precision sums over tokens overflow
            q, k, v = (
                rearrange(t.float(), "b n (heads d) -> b heads n d", heads=self.heads)
                for t in (F.relu(q), F.relu(k), v)
            )
            if q.shape[-2] <= q.shape[-1]:
                scores = q @ k.transpose(-1, -2)  # (B, heads, N, N)
                out = (scores @ v) / (scores.sum(-1, keepdim=True) + 1e-15)  # (B, heads, N, d)
            else:
                v = F.pad(v, (0, 1), value=1.0)  # a column of ones makes the denominator the last column
                out = q @ (k.transpose(-1, -2) @ v)  # (B, heads, N, d + 1)
                out = out[..., :-1] / (out[..., -1:] + 1e-15)
        out = rearrange(out, "b heads n d -> b n (heads d)").to(x.dtype)
        return self.to_out[1](kernels.applied(self.to_out[0], out))


class CrossAttention(nn.Module):
    """Softmax attention of image tokens over caption tokens. It has no norm and no gate before it."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        dim, self.heads = config.inner_dim, config.num_cross_attention_heads
        inner = self.heads * config.cross_attention_head_dim
        self.to_q = nn.Linear(dim, inner)
        self.to_k = nn.Linear(dim, inner)
        self.to_v = nn.Linear(dim, inner)
        self.norm_q = RMSNorm(inner, eps=1e-5) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(inner, eps=1e-5) if config.qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(config.dropout)])

    def keys_values(self, caption: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of caption tokens, (K, heads, L, d) each. They depend on the caption alone."""
        k, v = kernels.joined(caption, self.to_k, self.to_v)
        k, v = (rearrange(t, "k n (heads d) -> k heads n d", heads=self.heads) for t in (self.norm_k(k), v))
        return k, v

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        q = rearrange(
            self.norm_q(kernels.applied(self.to_q, x)), "b n (heads d) -> b heads n d", heads=self.heads
        )
        k, v = keys_values  # (B, heads, L, d) each
        out = kernels.attention(q, k, v, bias)
        out = rearrange(out, "b heads n d -> b n (heads d)")
        return self.to_out[1](kernels.applied(self.to_out[0], out))


class GLUMBConv(nn.Module):
    """Mix-FFN: 1x1 convolution, SiLU, 3x3 depthwise convolution, gated linear unit, 1x1 convolution.

    Tokens stay last in memory: the depthwise convolution then sees channels-last, its fast form everywhere.
    """

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(mlp_ratio * dim)
        self.conv_inverted = nn.Conv2d(dim, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor, height: int) -> Tensor:
        x = F.silu(kernels.pointwise(self.conv_inverted, x))  # (B, N, 2h)
        x = rearrange(x, "b (height width) c -> b c height width", height=height)
        x = rearrange(self.conv_depth(x), "b c height width -> b (height width) c")
        return kernels.pointwise(self.conv_point, kernels.gated_silu(x))  # (B, N, h) to (B, N, D)


class SanaBlock(nn.Module):
    """Modulated linear attention, cross-attention, modulated Mix-FFN, each added to the residual stream."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        dim = config.inner_dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn1 = LinearAttention(config)
        self.attn2 = CrossAttention(config)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ff = GLUMBConv(dim, config.mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))

    def forward(
        self,
        x: Tensor,
        caption: Tensor | tuple[Tensor, Tensor],
        caption_index: Tensor | None,
        bias: Tensor | None,
        modulation: Tensor,
        height: int,
    ) -> Tensor:
        keys_values = caption if isinstance(caption, tuple) else self.attn2.keys_values(caption)
        if caption_index is not None:
            keys_values = (
                keys_values[0].index_select(0, caption_index),
                keys_values[1].index_select(0, caption_index),
            )
        modulation = self.scale_shift_table[None] + modulation  # (B, 6, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(
            6, dim=1
        )  # (B, 1, D) each
        normed = torch.addcmul(shift_msa, self.norm1(x), 1 + scale_msa)
        x = torch.addcmul(x, gate_msa, self.attn1(normed.to(x.dtype)))
        x = x + self.attn2(x, keys_values, bias)
        normed = torch.addcmul(shift_mlp, self.norm2(x), 1 + scale_mlp)
        return torch.addcmul(x, gate_mlp, self.ff(normed.to(x.dtype), height))  # (B, N, D)


class SanaTransformer(nn.Module):
    """The SANA diffusion transformer."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = (
            False  # keep a block's input only, and recompute the rest in the backward pass
        )
        self.is_compiled = False
        dim, patch = config.inner_dim, config.patch_size
        self.patch_embed = PatchEmbed(config)
        self.time_embed = TimeEmbed(dim, config.guidance_embeds)
        self.caption_projection = TwoLayer(config.caption_channels, dim, nn.GELU(approximate="tanh"))
        self.caption_norm = RMSNorm(dim, eps=1e-5)
        self.transformer_blocks = nn.ModuleList(SanaBlock(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, patch * patch * config.in_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Captions,
        timestep: Tensor,
        guidance: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        caption_index: Tensor | None = None,
    ) -> Tensor:
        """The prediction at `hidden_states`, (B, C, H, W). Arguments are diffusers', in its order.

        Args:
            hidden_states: the noisy sample, (B, C, H, W), H and W multiples of the patch size.
            encoder_hidden_states: caption states, (B, L, caption_channels), or what `captions` made of them.
            timestep: (B,), or (1,) for all: 1000 * sigma * timestep_scale.
            guidance: as timestep: guidance_scale * guidance_embeds_scale; for models with `guidance_embeds`.
            encoder_attention_mask: (B, L), 1 for caption tokens and 0 for padding; None attends to all.
            caption_index: (B,), which of K captions and their masks belongs to each sample.

        Raises:
            ValueError: a shape that does not fit, or `guidance` given to a model that cannot use it.
        """
        _, channels, height, width = hidden_states.shape
        patch = self.config.patch_size
        if channels != self.config.in_channels:
            raise ValueError(
                f"hidden_states has {channels} channels; this model takes {self.config.in_channels}"
            )
        if height % patch or width % patch:
            raise ValueError(f"hidden_states is {height}x{width}; the patch size {patch} must divide both")
        if (guidance is not None) != self.config.guidance_embeds:
            raise ValueError("guidance is needed by models with guidance_embeds, and by no others")
        with kernels.native_arithmetic(self.scale_shift_table):
            given = (encoder_hidden_states, timestep, guidance, encoder_attention_mask, caption_index)
            ((x, embedded),) = deque(self._residual_stream(hidden_states, *given), maxlen=1)
            shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
            x = self.proj_out(torch.addcmul(shift, self.norm_out(x), 1 + scale))  # (B, N, p p C)
            return rearrange(
                x, "b (h w) (ph pw c) -> b c (h ph) (w pw)", h=height // patch, ph=patch, pw=patch, c=channels
            )  # fmt: skip

    def compile_blocks(self, compiled: bool = True) -> None:
        """Run every block through `torch.compile`, or again as it is written.

        All blocks share what is compiled. It serves any number and length of captions; each other shape is
        compiled when it is first seen.
        """
        for block in self.transformer_blocks:
            if compiled:
                block.compile(dynamic=False)  # but for what `any_captions` marks
            else:
                block._compiled_call_impl = None
        self.is_compiled = compiled

    def ready_to_draw(self) -> "SanaTransformer":
        """Itself, with its memory laid out for drawing: it is not to be trained or saved."""
        for block in self.transformer_blocks:
            assert isinstance(block, SanaBlock)
            kernels.lay_end_to_end(block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        return self.requires_grad_(False).eval()

    def captions(
        self, states: Tensor, mask: Tensor | None = None, caption_index: Tensor | None = None
    ) -> Captions:
        """Keys and values of caption states (K, L, caption_channels) with their mask (K, L).

        They serve all solver steps. With `caption_index` (B,) they are those of each sample.
        """
        with kernels.native_arithmetic(self.scale_shift_table):
            caption = self.caption_norm(self.caption_projection(states))  # (K, L, D)
            rows = torch.arange(len(states), device=states.device) if caption_index is None else caption_index
            made = []
            for block in self.transformer_blocks:
                assert isinstance(block, SanaBlock)
                made.append(block.attn2.keys_values(caption))
            bias = _mask_bias(mask, rows, caption.dtype)
            return Captions(tuple((k[rows], v[rows]) for k, v in made), bias)

    def features(
        self,
        blocks: Sequence[int],
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Captions,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        caption_index: Tensor | None = None,
    ) -> list[Tensor]:
        """The token states (B, N, D) after each of some blocks, in their order. Arguments as of `forward`.

        Blocks after the last of them do not run.
        """
        with kernels.native_arithmetic(self.scale_shift_table):
            given = (encoder_hidden_states, timestep, None, encoder_attention_mask, caption_index)
            stream = self._residual_stream(hidden_states, *given)
            return [
                x for number, (x, _) in zip(range(max(blocks) + 1), stream, strict=False) if number in blocks
            ]

    def _residual_stream(
        self,
        x: Tensor,
        states: Tensor | Captions,
        timestep: Tensor,
        guidance: Tensor | None,
        mask: Tensor | None,
        caption_index: Tensor | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The tokens (B, N, D) after each block, with the embedded timestep (B or 1, D)."""
        height, patch = x.shape[2], self.config.patch_size
        # under autocast patches come out in bf16, and the first block would make them float32
        x = self.patch_embed(x).to(self.scale_shift_table.dtype)  # (B, N, D)
        modulation, embedded = self.time_embed(timestep, guidance, x.dtype)  # (B or 1, 6, D), (B or 1, D)
        captions: Sequence[Tensor | tuple[Tensor, Tensor]]
        if isinstance(states, Captions):
            captions, bias = states.keys_values, states.bias
        else:
            caption = self.caption_norm(self.caption_projection(states))  # (K, L, D)
            captions, bias = [caption] * self.config.num_layers, _mask_bias(mask, caption_index, x.dtype)
        if self.is_compiled:
            kernels.any_captions(captions[0], bias)
        for block, caption in zip(self.transformer_blocks, captions, strict=True):
            given = (x, caption, caption_index, bias, modulation, height // patch)
            recompute = self.activation_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, *given, use_reentrant=False) if recompute else block(*given)
            yield x, embedded


def _mask_bias(mask: Tensor | None, caption_index: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to attention scores, (B, 1, 1, L), from a mask (K, L) and `caption_index` (B,)."""
    if mask is None:
        return None
    bias = (1 - mask.to(dtype))[:, None, None, :] * MASKED  # (K, 1, 1, L)
    return bias if caption_index is None else bias[caption_index]


@torch.no_grad()
def initialize(model: SanaTransformer, generator: torch.Generator, init: str = "official") -> None:
    """Draw initial weights: those of NVlabs/Sana (`sana_multi_scale.py`), or close to them.

    - Linear layers and the patch convolution: Xavier-uniform with zero bias. The fan is that of the fused
      matrices of the official code (qkv in self-attention, kv in cross-attention).
    - Embedders: N(0, 0.02). Tables: N(0, 1/D). Other convolutions: PyTorch's default.
    - The caption norm starts at 0.01: at 1, captions would enter a hundred times too strongly.
    - Only the guidance embedder's last layer starts at zero.

    With `init` "fan_in" embedders are N(0, 1 / fan_in), which is 0.02 to 0.06 at the published widths. At a
    width of 128, 0.02 hides the timestep from the transformer for long. The caption norm then starts at 1.
    """

    def uniform(tensor: Tensor, bound: float) -> None:
        tensor.uniform_(-bound, bound, generator=generator)

    def xavier(weight: Tensor, fused: int = 1) -> None:
        uniform(weight, math.sqrt(6 / (fused * weight.shape[0] + weight[0].numel())))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            xavier(module.weight)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            uniform(module.weight, bound)
            if module.bias is not None:
                uniform(module.bias, bound)
        elif isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
    for block in model.transformer_blocks:
        assert isinstance(block, SanaBlock)
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            xavier(linear.weight, fused=3)
        for linear in (block.attn2.to_k, block.attn2.to_v):
            xavier(linear.weight, fused=2)
    xavier(model.patch_embed.proj.weight)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table"):
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        elif name.startswith(("time_embed.", "caption_projection.")) and name.endswith("weight"):
            parameter.normal_(
                std=0.02 if init == "official" else parameter.shape[1] ** -0.5, generator=generator
            )
    if model.time_embed.guidance_embedder is not None:
        model.time_embed.guidance_embedder.linear_2.weight.zero_()
    model.caption_norm.weight.fill_(0.01 if init == "official" else 1.0)


def build(config: Architecture, seed: int | None = 0, init: str = "official") -> SanaTransformer:
    """A new model with the initial weights of `seed`, float32 on the CPU; None: on the meta device."""
    with torch.device("meta"):
        model = SanaTransformer(config)
    if seed is not None:
        model.to_empty(device="cpu")
        initialize(model, torch.Generator().manual_seed(seed), init)
    return model


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix or a convolution: biases, norms and tables are not."""
    return parameter.ndim >= 2 and not name.endswith(TABLE)


def module_rows(model: SanaTransformer) -> tuple[tuple[str, int, float], ...]:
    """(module, parameters, share): all blocks as one row, then their parts."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[0] == "transformer_blocks":
            counts[f"transformer_blocks x {model.config.num_layers}"] += parameter.numel()
            counts[f"  {parts[2]}"] += parameter.numel()
        else:
            counts[parts[0]] += parameter.numel()
    total = sum(counts.values()) - sum(count for name, count in counts.items() if name.startswith("  "))
    return tuple((name, count, count / total) for name, count in counts.items())
