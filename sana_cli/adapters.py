"""Low-rank adapters beside a SANA's frozen layers: LoRA, rank-stabilised LoRA and DoRA.

An adapted layer computes what it did before and adds a side branch, so that small changes are not rounded away
with the weights of a bf16 model. Parameters are named `LAYER.adapters.0.lora_A`, and keep their own type. It knows
no files (`weights/adapters.py`) and no training.

Shapes: r rank, i o numbers that a layer's matrix takes and gives; a convolution's i is channels times kernel.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_cli import kernels
from sana_cli.config.keys import AdapterConfig
from sana_cli.errors import SanaError, listed

ADAPTERS = "adapters"  # the part of a parameter's name that says it is an adapter's
Product = Callable[
    [Tensor, Tensor], Tensor
]  # x and a matrix (o, i) to what a layer makes of x, channels last


@dataclass(frozen=True)
class LowRank:
    """W + scale B A; with a magnitude (DoRA, arXiv 2402.09353), its rows scaled to these norms."""

    lora_A: Tensor  # (r, i)  # noqa: N815 (as everyone calls them)
    lora_B: Tensor  # (o, r)  # noqa: N815
    scale: float = 1.0
    magnitude: Tensor | None = None  # (o,)

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.lora_A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i) of the layer that it belongs to."""
        return self.lora_B.shape[0], self.lora_A.shape[1]

    def delta(self) -> Tensor:
        """scale B A, (o, i)."""
        return self.scale * (self.lora_B @ self.lora_A)

    def scaled(self, by: float) -> "LowRank":
        """The same, so many times as strong."""
        return LowRank(self.lora_A, self.lora_B, self.scale * by, self.magnitude)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "LowRank":
        """A copy on a device."""
        magnitude = None if self.magnitude is None else self.magnitude.to(device, dtype, copy=True)
        down, up = (tensor.to(device, dtype, copy=True) for tensor in (self.lora_A, self.lora_B))
        return LowRank(down, up, self.scale, magnitude)


@dataclass(frozen=True)
class Dense:
    """W + scale D: a change that is no product of two thin matrices, such as a LoKr."""

    matrix: Tensor  # (o, i)
    scale: float = 1.0
    magnitude: None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(o, i) of the layer that it belongs to."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def delta(self) -> Tensor:
        """scale D, (o, i)."""
        return self.scale * self.matrix

    def scaled(self, by: float) -> "Dense":
        """The same, so many times as strong."""
        return Dense(self.matrix, self.scale * by)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Dense":
        """A copy on a device."""
        return Dense(self.matrix.to(device, dtype, copy=True), self.scale)


Change = LowRank | Dense  # of one layer


def merged(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """A layer's matrix (o, i) with changes worked into it, in float32.

    It gives what the side branches give: each wraps what those before it made, and a magnitude is that of the
    layer's own matrix with that one change.
    """
    own = weight.float()
    made = own
    for change in changes:
        delta = change.delta().float()
        made = made + delta
        if change.magnitude is not None:
            made = made * (change.magnitude.float() / (own + delta).norm(dim=1))[:, None]
    return made


class Adapter(nn.Module):
    """A side branch. `lora_A` and `lora_B` are its parameters, or `matrix` where it is dense."""

    def __init__(self, change: Change, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.dropout = change.scale, dropout
        self.lora_A = self.lora_B = self.matrix = None
        if isinstance(change, LowRank):
            self.lora_A, self.lora_B = nn.Parameter(change.lora_A), nn.Parameter(change.lora_B)
        else:
            self.matrix = nn.Parameter(change.matrix)
        own = change.magnitude
        self.lora_magnitude_vector = None if own is None else nn.Parameter(own)

    def change(self) -> Change:
        """What it makes of its layer."""
        if self.matrix is not None:
            return Dense(self.matrix, self.scale)
        assert self.lora_A is not None
        assert self.lora_B is not None
        return LowRank(self.lora_A, self.lora_B, self.scale, self.lora_magnitude_vector)

    def forward(self, layer: nn.Linear | nn.Conv2d, x: Tensor, out: Tensor, product: Product) -> Tensor:
        """What a layer gives with this branch, where it gave `out`, channels last, without."""
        dropped = F.dropout(x, self.dropout, self.training)
        if self.matrix is not None:
            change = product(_as(dropped, self.matrix), self.matrix) * self.scale
        else:
            assert self.lora_A is not None
            assert self.lora_B is not None
            low = product(_as(dropped, self.lora_A), self.lora_A)
            change = kernels.linear(low, self.lora_B) * self.scale
        if self.lora_magnitude_vector is None:
            return out + change.to(out.dtype)
        gain = self.lora_magnitude_vector / self._norms(layer.weight)
        if self.training and self.dropout:
            plain = product(_as(dropped, layer.weight), layer.weight.flatten(1))
        else:
            plain = out if layer.bias is None else out - layer.bias
        return (out + (gain - 1) * plain + gain * change).to(out.dtype)

    @torch.no_grad()
    def _norms(self, weight: Tensor) -> Tensor:
        """Norms (o,) of the rows of W + scale B A; no gradient goes through them (DoRA, section 4.3)."""
        with torch.autocast(weight.device.type, enabled=False):
            return (weight.flatten(1).float() + self.change().delta()).norm(dim=1)


def _as(x: Tensor, weight: Tensor) -> Tensor:
    """X in the type of a weight, where autocast does not see to it."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


class AdaptedLinear(nn.Linear):
    """A linear layer with side branches."""

    def __init__(self, layer: nn.Linear) -> None:
        """Take over a layer's weights."""
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.adapters = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) to (..., o)."""
        return _of_tokens(self, x)


class AdaptedConv2d(nn.Conv2d):
    """A convolution without groups, with side branches."""

    def __init__(self, layer: nn.Conv2d) -> None:
        """Take over a layer's weights."""
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            bias=layer.bias is not None,
            device="meta",
        )
        self.weight, self.bias = layer.weight, layer.bias
        self.adapters = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, o, H', W')."""
        out = super().forward(x).movedim(1, -1)

        def product(x: Tensor, matrix: Tensor) -> Tensor:
            kernel = matrix.view(-1, self.in_channels, *self.kernel_size)
            return F.conv2d(x, kernel, None, self.stride, self.padding).movedim(1, -1)

        for adapter in self.adapters:
            out = adapter(self, x, out, product)
        return out.movedim(-1, 1)

    def of_tokens(self, x: Tensor) -> Tensor:
        """A 1x1 convolution of tokens (B, N, C), computed as the linear layer that it is."""
        return _of_tokens(self, x)


Adapted = AdaptedLinear | AdaptedConv2d


def _of_tokens(layer: Adapted, x: Tensor) -> Tensor:
    """What a layer whose weights are a matrix makes of x (..., i), with its side branches: (..., o)."""
    out = kernels.linear(x, layer.weight.flatten(1), layer.bias)
    for adapter in layer.adapters:
        out = adapter(layer, x, out, kernels.linear)
    return out


def layers_of(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that can have an adapter, by name: linear ones and convolutions without groups."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The layers that have adapters, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Adapted)}


def matrix_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """(o, i) of a layer's matrix."""
    return layer.weight.shape[0], layer.weight[0].numel()


def attach(model: nn.Module, changes: Mapping[str, Change], dropout: float = 0.0) -> None:
    """Give layers of these names an adapter more. The layers' own weights stay what and where they are.

    Raises:
        SanaError: the model has no such layer, or a change is of another shape; names each.
    """
    layers = layers_of(model)
    wrong = [f"{name}: the model has no such layer" for name in changes if name not in layers]
    for name, change in changes.items():
        if name in layers and (there := matrix_shape(layers[name])) != change.shape:
            wrong.append(f"{name}: a change of {change.shape}, where the layer is {there}")
    if wrong:
        raise SanaError("adapters do not fit the model:", *listed(wrong))
    for name, change in changes.items():
        layer = layers[name]
        if not isinstance(layer, Adapted):
            above, _, own = name.rpartition(".")
            layer = AdaptedLinear(layer) if isinstance(layer, nn.Linear) else AdaptedConv2d(layer)
            setattr(model.get_submodule(above), own, layer)
        adapter = Adapter(change, dropout)
        layer.adapters.append(adapter.train(layer.training))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return f".{ADAPTERS}." in name


def matching(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the layers whose names end with one of `targets`, in the model's order.

    Raises:
        SanaError: a target names no layer, or one that cannot have an adapter.
    """
    layers = layers_of(model)
    kinds = sorted({name.rpartition(".")[2] if name[-1].isalpha() else ".".join(name.split(".")[-2:])
                    for name in layers})  # fmt: skip

    def named(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    for target in targets:
        if not any(named(name, target) for name in layers):
            depthwise = any(named(name, target) for name, _ in model.named_modules())
            why = (
                f"{target!r} cannot have one: it is no linear layer and no plain convolution"
                if depthwise
                else f"no layer is called {target!r}"
            )
            raise SanaError(f"adapter.targets: {why}", f"there are {', '.join(kinds)}", exit_code=2)
    return [name for name in layers if any(named(name, target) for target in targets)]


def new_changes(
    model: nn.Module, names: Sequence[str], rank: int, scale: float, dora: bool, generator: torch.Generator
) -> dict[str, Change]:
    """Adapters that change nothing yet, float32: A is N(0, 1 / r^2), as in diffusers' scripts, B zero.

    Magnitudes begin as the norms of the layers' rows. The model may be on the meta device, except with `dora`.
    """
    made: dict[str, Change] = {}
    layers = layers_of(model)
    for name in names:
        out, into = matrix_shape(layers[name])
        down = torch.randn(rank, into, generator=generator) / rank
        weight = layers[name].weight.detach()
        magnitude = weight.flatten(1).float().norm(dim=1) if dora else None
        made[name] = LowRank(down, torch.zeros(out, rank), scale, magnitude)
    return made


def empty_changes(
    model: nn.Module, names: Sequence[str], rank: int, scale: float, dora: bool
) -> dict[str, Change]:
    """Adapters of these shapes without numbers, on the meta device."""
    layers, made = layers_of(model), dict[str, Change]()
    for name in names:
        out, into = matrix_shape(layers[name])
        with torch.device("meta"):
            made[name] = LowRank(
                torch.empty(rank, into), torch.empty(out, rank), scale, torch.empty(out) if dora else None
            )
    return made


PARAMETERS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "magnitude"}


def named_parameters(changes: Mapping[str, Change]) -> dict[str, Tensor]:
    """The parameters of low-rank adapters as a model with them names them."""
    return {
        f"{name}.{ADAPTERS}.0.{parameter}": tensor
        for name, change in changes.items()
        for parameter, field in PARAMETERS.items()
        if (tensor := getattr(change, field)) is not None
    }


def changes_from(parameters: Mapping[str, Tensor], scale: float) -> dict[str, Change]:
    """The reverse of `named_parameters`, for adapters of one scale."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parameters.items():
        layer, _, parameter = name.partition(f".{ADAPTERS}.0.")
        layers.setdefault(layer, {})[PARAMETERS[parameter]] = tensor
    return {layer: LowRank(scale=scale, **tensors) for layer, tensors in layers.items()}


def changes_of(model: nn.Module, index: int = 0) -> dict[str, Change]:
    """Adapter number `index` of each layer that has so many."""
    found = {}
    for name, layer in adapted_layers(model).items():
        if index < len(layer.adapters):
            adapter = layer.adapters[index]
            assert isinstance(adapter, Adapter)
            found[name] = adapter.change()
    return found


def adapter_scale(rank: int, alpha: float | None, rank_stabilized: bool) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); alpha is r where none is given."""
    return (rank if alpha is None else alpha) / (math.sqrt(rank) if rank_stabilized else rank)


def scale_of(config: AdapterConfig) -> float:
    """The scale of a run's adapters."""
    return adapter_scale(config.rank, config.alpha, config.rank_stabilized)


def kind_of(name: str) -> str:
    """The kind of a layer: its name without its block, such as `attn1.to_q`."""
    parts = name.split(".")
    return ".".join(parts[2:]) if parts[0] == "transformer_blocks" else name


def squared_norm(change: Change, weight: Tensor | None) -> float:
    """The squared Frobenius norm of what a change adds to its layer's matrix (o, i).

    A low-rank one needs no (o, i) matrix: |B A|^2 is the trace of (B^T B)(A A^T). One with a magnitude does, and
    needs the layer's `weight`. Sums are float64, which MPS lacks, so they are taken on the CPU.
    """
    if isinstance(change, Dense):
        square = change.delta().cpu().double().square().sum()
    elif change.magnitude is None:
        down, up = change.lora_A.cpu().double(), change.lora_B.cpu().double()
        square = ((up.T @ up) * (down @ down.T)).sum() * change.scale**2
    else:
        assert weight is not None
        moved = merged(weight.flatten(1), [change]) - weight.flatten(1).float()
        square = moved.cpu().double().square().sum()
    return max(float(square), 0.0)
