"""The same arithmetic, quicker: `model.py` would be right without it.

Products of several layers are joined, memory is saved, and a device gets the form that it runs fast. A
layer that is more than its weights (an adapter, a hook, a parametrization) is called as it is.

Shapes: B batch, K distinct captions in it, N tokens, L caption tokens, d head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli.runtime.device import has_native_bf16, mkl_keeps_to_avx2

LEAST = 1 << 23  # multiplications: for smaller products it does not matter who makes them
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its weights and nothing else, so that its product may be joined with others."""
    untouched = "forward" not in vars(layer) and not any(getattr(layer, hooks) for hooks in _HOOKS)
    return type(layer) in (nn.Linear, nn.Conv2d) and untouched


class _Product(torch.autograd.Function):
    """a b^T + bias for a (m, k), b (n, k), by oneDNN. Both gradients are such products, of transposed views."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx: Any, of_a: Tensor | None, of_b: Tensor | None, of_bias: Tensor | None) -> Tensor:
        a, b = ctx.saved_tensors
        parts = [None if of_a is None else of_a @ b.t(), None if of_b is None else a @ of_b.t(), of_bias]
        made = [part for part in parts if part is not None]
        return sum(made[1:], start=made[0]).expand(len(a), len(b))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), (needs_a, needs_b, needs_bias) = ctx.saved_tensors, ctx.needs_input_grad
        of_a = _Product.apply(grad, b.t(), None) if needs_a else None  # type: ignore[no-untyped-call]
        of_b = _Product.apply(grad.t(), a.t(), None) if needs_b else None  # type: ignore[no-untyped-call]
        return of_a, of_b, grad.sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for x (..., i) and W (o, i), as `F.linear`.

    PyTorch multiplies float32 by MKL, which leaves half of the arithmetic of some processors unused.
    """
    if _by_onednn(x, weight):
        flat = _Product.apply(x.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
        return flat.unflatten(0, x.shape[:-1])
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN makes a product of float32 faster, and it is large enough to show it."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.ndim > 1
        and x.numel() * len(weight) >= LEAST
        and mkl_keeps_to_avx2()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # Inductor chooses for itself
    )


def applied(layer: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer, or one that stands for it, makes of x (..., i)."""
    if isinstance(layer, nn.Linear) and is_plain(layer):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def quick_products(model: nn.Module) -> None:
    """Let the linear layers of a model of another library multiply as ours do. It stays what it is in all else."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and is_plain(layer):
            layer.__class__ = _Linear


def joined(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """What several linear layers of one width make of the same x.

    One product with their weights end to end runs faster, forward and back, than one for each.
    """
    if not all(map(is_plain, layers)):
        return tuple(layer(x) for layer in layers)
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return linear(x, _end_to_end([layer.weight for layer in layers]), bias).chunk(len(layers), dim=-1)


def _end_to_end(weights: Sequence[Tensor]) -> Tensor:
    """Weights (o, i) as one, (sum of o, i): a copy, or without gradients the memory itself if it lies so."""
    first = weights[0]
    if not torch.is_grad_enabled() and _follow(weights):
        return first.as_strided((sum(map(len, weights)), *first.shape[1:]), first.stride())
    return torch.cat(list(weights))


def _follow(weights: Sequence[Tensor]) -> bool:
    """Whether each lies behind the one before it, in the same memory."""
    memory, at = weights[0].untyped_storage()._cdata, weights[0].storage_offset()
    for weight in weights:
        here = (weight.untyped_storage()._cdata, weight.storage_offset())
        if here != (memory, at) or not weight.is_contiguous():
            return False
        at += weight.numel()
    return True


def lay_end_to_end(*layers: nn.Linear) -> None:
    """Move the weights of layers whose products are joined into one piece of memory, for a model that only draws.

    Copying them together at every step would take about as long as the norms and gates do.
    """
    if all(map(is_plain, layers)):
        whole = torch.cat([layer.weight.detach() for layer in layers])
        for layer, part in zip(layers, whole.split([len(layer.weight) for layer in layers]), strict=True):
            layer.weight.data = part


def pointwise(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of tokens (B, N, C), computed as the linear layer that it is."""
    if is_plain(convolution):
        return linear(x, convolution.weight.flatten(1), convolution.bias)
    if (of_tokens := getattr(convolution, "of_tokens", None)) is not None:  # one with adapters
        return of_tokens(x)
    return convolution(x.transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)  # (B, C, N, 1) inside


class _GatedSiLU(torch.autograd.Function):
    """Keeps its input alone for the backward pass, and writes both halves of the gradient into one tensor.

    Separate operations would keep silu(gate) too, and join the halves again.
    """

    @staticmethod
    def forward(both: Tensor) -> Tensor:
        x, gate = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        (x, gate), (of_x, of_gate) = both.chunk(2, dim=-1), tangent.chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        return of_x * gate * sigmoid + x * slope * of_gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        x, gate = both.chunk(2, dim=-1)
        out = torch.empty_like(both)
        of_x, of_gate = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=of_x)
        torch.ops.aten.silu_backward(grad * x, gate, grad_input=of_gate)
        return out


def gated_silu(both: Tensor) -> Tensor:
    """x silu(gate) of the two halves (..., h) of one tensor (..., 2h)."""
    if torch.compiler.is_compiling():  # it cannot trace a forward derivative, and joins these by itself
        x, gate = both.chunk(2, dim=-1)
        return x * F.silu(gate)
    return _GatedSiLU.apply(both)  # type: ignore[no-untyped-call]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, for q (B, heads, N, d), k and v (B, heads, L, d).

    With few caption tokens the backward pass of the CPU's fused kernel costs many times this.
    """
    if q.device.type != "cpu" and not _differentiated_forward:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, N, L)
    return (scores if bias is None else scores + bias).softmax(-1).to(v.dtype) @ v


def any_captions(caption: Tensor | tuple[Tensor, Tensor], bias: Tensor | None) -> None:
    """Tell the compiler that captions (K, L, D) and their bias (B, 1, 1, L) come in any number and length.

    Batches differ in both. Left to find that out, it would compile again for the second batch, in a way that
    depends on which batches came first: a resumed run would not be the same to the bit.
    """
    for tensor, dims in ((caption, [0, 1]), (bias, [3])):
        if isinstance(tensor, Tensor):
            torch._dynamo.maybe_mark_dynamic(tensor, dims)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a compiled model as it is written, for batches of other shapes than training's."""
    with torch.compiler.set_stance("force_eager") if getattr(model, "is_compiled", False) else nullcontext():
        yield


@dataclass(frozen=True)
class Captions:
    """All that a transformer needs of captions, the same at every noise level (`SanaTransformer.captions`)."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]  # of each block, (B, heads, L, d) each
    bias: Tensor | None  # (B, 1, 1, L)

    def rows(self, first: int, end: int) -> "Captions":
        """Those of samples `first` .. `end`."""
        bias = None if self.bias is None else self.bias[first:end]
        return Captions(tuple((k[first:end], v[first:end]) for k, v in self.keys_values), bias)


_differentiated_forward = False


@contextmanager
def forward_derivatives() -> Iterator[None]:
    """Use only operations that have a forward derivative: fused attention has none."""
    global _differentiated_forward
    _differentiated_forward = True
    try:
        yield
    finally:
        _differentiated_forward = False


_as_asked = False


@contextmanager
def arithmetic_as_asked() -> Iterator[None]:
    """Keep bf16 autocast even where this device emulates it, for a pass that stands for another device."""
    global _as_asked
    _as_asked = True
    try:
        yield
    finally:
        _as_asked = False


@contextmanager
def native_arithmetic(weight: Tensor) -> Iterator[None]:
    """Float32 in place of a bf16 autocast that the device of a float32 `weight` could only emulate.

    Autocast to bf16 is there for speed. A CPU without bf16 arithmetic takes tens of times as long over it
    as over float32, which is also more exact.
    """
    cast = weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    emulated = cast and not _as_asked and not has_native_bf16(weight.device)
    with torch.autocast("cpu", enabled=False) if emulated else nullcontext():
        yield
