"""AdamW, Muon, CAME and the schedules of learning rate and weight average. It knows no model and no files.

Optimizer state has the names of its parameters, and is whole in a checkpoint however parameters are sharded.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sana_cli.config.keys import OptimConfig
from sana_cli.model import TABLE, is_matrix
from sana_cli.runtime.device import return_memory
from sana_cli.runtime.distributed import replicate, replicate_like, shard_like

INSTABILITY_DECAY = 0.9999  # CAME's third beta, as in the official configs
EPS_SQUARE, EPS_INSTABILITY = 1e-30, 1e-16  # CAME's, as there
CHUNK = 1 << 20  # numbers that are rounded at once
EXPONENT = 0x7F800000  # its bits in a float32; all ones in NaNs and infinities
RETURNED = 1 << 25  # bf16 numbers that move before the memory of their float32 copies is returned


def lr_factor(optim: OptimConfig, step: int, steps: int) -> float:
    """The learning rate after `step` of `steps` steps, over its peak: linear warm-up, then `schedule`."""
    warmup = optim.warmup(steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if optim.schedule == "linear" else 1.0


def average_decay(ema_decay: float, step: int) -> float:
    """Decay of the weight average at the update after `step` steps: young averages forget faster."""
    return min(ema_decay, (1 + step) / (10 + step))


# --- which rule moves a parameter -------------------------------------------------------------


def is_pointwise(parameter: Tensor) -> bool:
    """Whether a parameter is a 1x1 convolution (o, i, 1, 1), which is the matrix (o, i)."""
    return parameter.ndim == 4 and parameter.shape[2:] == (1, 1)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves a parameter: a matrix, or a 1x1 convolution of the Mix-FFN, inside a block.

    Embedders, the output layer and the depthwise convolution, whose rows share nothing, stay with AdamW
    (kellerjordan.github.io/posts/muon).
    """
    inside = name.startswith("transformer_blocks.") and not name.endswith(TABLE)
    return inside and (parameter.ndim == 2 or (is_pointwise(parameter) and parameter.shape[1] > 1))


def rule_of(name: str, parameter: Tensor, optim: OptimConfig) -> str:
    """Which of adamw, muon and came moves a parameter."""
    if optim.optimizer == "muon":
        return "muon" if is_hidden_matrix(name, parameter) else "adamw"
    return optim.optimizer


def optimizer_bytes(named: Iterable[tuple[str, Tensor]], optim: OptimConfig) -> int:
    """The bytes of the state of parameters, whose sizes and types alone are read."""
    total = 0
    for name, p in named:
        rule = rule_of(name, p, optim)
        if rule == "came":
            total += p.numel() * p.element_size()  # the first moment has the parameter's type
            is_factored = p.ndim == 2 or is_pointwise(p)
            total += 2 * 4 * (p.shape[0] + p.shape[1]) if is_factored else 4 * p.numel()
        else:
            total += p.numel() * 4 * (1 if rule == "muon" else 2)
    return total


# --- CAME -------------------------------------------------------------------------------------


class Came(torch.optim.Optimizer):
    """CAME (arXiv 2307.02047, algorithm 2): Adafactor's update, trusted less where it keeps changing.

    A matrix has the mean squares of its rows and columns, and other shapes one of each number. As in the
    authors' code there is no correction of young averages, an update's root mean square is at most 1, and
    only matrices have a measure of instability. So the first updates of matrices are some ten times the
    learning rate, and need a warm-up. Moves float32 parameters, which may be sharded.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float, float]
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Move the parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        slots, lr, (of_update, of_square, of_instability) = self.state[parameter], group["lr"], group["betas"]
        update = _over_root(grad, slots, "exp_avg_sq", grad.square().add_(EPS_SQUARE), of_square)
        size = replicate(torch.linalg.vector_norm(update)) / update.numel() ** 0.5
        update.div_(size.clamp_(min=1.0))
        if "exp_avg" not in slots:
            slots["exp_avg"] = torch.zeros_like(parameter)
        average = slots["exp_avg"].mul_(of_update).add_(update, alpha=1 - of_update)
        if parameter.ndim == 2:
            instability = update.sub_(average).square_().add_(EPS_INSTABILITY)
            update = _over_root(average, slots, "exp_avg_res", instability, of_instability)
        else:
            update = average.clone()
        if group["weight_decay"]:
            parameter.add_(parameter, alpha=-group["weight_decay"] * lr)
        parameter.sub_(update.mul_(lr))


def _over_root(tensor: Tensor, slots: dict[str, Tensor], kind: str, squares: Tensor, decay: float) -> Tensor:
    """A tensor / sqrt of the running mean of squares, sharded as the tensor is.

    The mean of a matrix (o, i) comes from the means of its rows and columns.
    """
    if squares.ndim != 2:
        return _averaged(slots, kind, squares, decay).rsqrt().mul_(tensor)
    row = _averaged(slots, f"{kind}_row", replicate(squares.mean(-1)), decay)
    col = _averaged(slots, f"{kind}_col", replicate(squares.mean(-2)), decay)
    of_rows = (row / row.mean(-1, keepdim=True)).rsqrt_()
    # one after the other: their product would be whole in every process
    return (tensor * of_rows.unsqueeze(-1)).mul_(col.rsqrt().unsqueeze(-2))


def _averaged(slots: dict[str, Tensor], kind: str, value: Tensor, decay: float) -> Tensor:
    if kind not in slots:
        slots[kind] = torch.zeros_like(value)
    return slots[kind].mul_(decay).add_(value, alpha=1 - decay)


# --- bf16 weights -----------------------------------------------------------------------------


def round_at_random(tensor: Tensor, into: Tensor, key: str) -> None:
    """Round float32 to bf16, up or down at random, so that the expected result is the value itself.

    Rounding to nearest would lose every update below half a unit in the last place of its weight, 0.2 to
    0.4 % of it. The random bits are a function of `key` and of each number's index, the same on every
    device.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    first, second = (int.from_bytes(half, "little", signed=True) for half in (digest[:4], digest[4:]))
    numbers, rounded = tensor.reshape(-1), into.view(-1)
    for at in range(0, len(numbers), CHUNK):
        bits = numbers[at : at + CHUNK].view(torch.int32)
        noise = _hash(torch.arange(at, at + len(bits), dtype=torch.int32, device=bits.device), first, second)
        # bf16 is the upper half of float32: what the lower half and the noise carry over rounds up
        drawn = noise.add_(bits).bitwise_and_(-0x10000).view(torch.float32)
        is_finite = (bits & EXPONENT) != EXPONENT  # what is added to a NaN may carry into its sign
        rounded[at : at + CHUNK] = torch.where(is_finite, drawn, numbers[at : at + CHUNK])


def _hash(x: Tensor, first: int, second: int) -> Tensor:
    """16 random bits for each int32, in place: lowbias32 (nullprogram.com/blog/2018/07/31) with two keys."""
    x.add_(first)
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D).bitwise_xor_(second)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - (1 << 32))
    return (x >> 16).bitwise_and_(0xFFFF)


class _Bf16Parameter:
    """A bf16 parameter with an optimizer of its own, which moves a float32 copy that lives for its step."""

    def __init__(self, parameter: nn.Parameter, wide: nn.Parameter, part: torch.optim.Optimizer) -> None:
        self.parameter, self.wide, self.part = parameter, wide, part

    @torch.no_grad()
    def step(self, key: str) -> None:
        """Move the parameter, by its gradient, which is freed."""
        parameter, wide, slots = self.parameter, self.wide, self.part.state[self.wide]
        if parameter.grad is None:
            return
        shape = parameter.shape[: wide.ndim]  # a 1x1 convolution is moved as a matrix
        none, moment = wide.data, None
        if isinstance(self.part, Came):  # AdamW's and Muon's moments are float32
            moment = slots.get("exp_avg")
            if moment is None:
                moment = torch.zeros(shape, dtype=torch.bfloat16, device=parameter.device)
            slots["exp_avg"] = moment.float()
        wide.data, wide.grad = parameter.float().reshape(shape), parameter.grad.float().reshape(shape)
        parameter.grad = None
        self.part.step()
        round_at_random(wide, parameter, key)
        if moment is not None:
            round_at_random(slots["exp_avg"], moment, f"exp_avg {key}")
            slots["exp_avg"] = moment
        wide.grad = None
        wide.data = none


# --- all of a model's parameters --------------------------------------------------------------


class Optimizer:
    """AdamW on everything; Muon on the matrices inside blocks and AdamW on the rest; or CAME on everything.

    Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that one learning
    rate and one weight decay serve both. Muon and CAME take a 1x1 convolution for the matrix that it is.

    A bf16 parameter moves in float32 and is rounded stochastically: random bits depend on the seed, the
    step and the parameter's name. CAME's first moment of it is bf16 too, rounded alike.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        optim: OptimConfig,
        device: torch.device,
        seed: int = 0,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """Move the parameters of these names; `rates` are their learning rates over that of a step, 1 if None."""
        self.names: dict[nn.Parameter, str] = {}  # of parameters as their rules see them
        self._optim, self._device, self._seed, self._steps = optim, device, seed, 0
        self._rates = rates or {}
        self._flat: list[tuple[nn.Parameter, nn.Parameter]] = []  # a 1x1 convolution, and itself as a matrix
        self._bf16: dict[str, _Bf16Parameter] = {}
        moved: dict[str, list[nn.Parameter]] = {"adamw": [], "muon": [], "came": []}
        for name, parameter in named.items():
            rule = rule_of(name, parameter, optim)
            seen, is_flat = parameter, rule != "adamw" and is_pointwise(parameter)
            if parameter.dtype == torch.bfloat16:
                dims = 2 if is_flat else parameter.ndim
                seen = nn.Parameter(torch.empty([0] * dims, device=parameter.device))
            elif is_flat:
                seen = nn.Parameter(parameter.detach().flatten(1))  # the same memory
                self._flat.append((parameter, seen))
            self.names[seen] = name
            if seen.dtype == parameter.dtype:
                moved[rule].append(seen)
            else:
                self._bf16[name] = _Bf16Parameter(parameter, seen, self._part(rule, [seen]))
        self._parts = [self._part(rule, parameters) for rule, parameters in moved.items() if parameters]

    def _part(self, rule: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimizer for parameters that one rule moves."""
        optim = self._optim
        alike: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
        for p in parameters:
            name = self.names[p]
            alike.setdefault((is_matrix(name, p), self._rates.get(name, 1.0)), []).append(p)
        groups: list[dict[str, Any]] = [
            {"params": some, "weight_decay": optim.weight_decay if decays else 0.0, "rate": rate}
            for (decays, rate), some in alike.items()
        ]
        if rule == "came":
            return Came(groups, optim.lr, (*optim.betas, INSTABILITY_DECAY))
        if rule == "muon":
            return torch.optim.Muon(
                [group for group in groups if group["params"]],
                lr=optim.lr,
                momentum=optim.momentum,
                adjust_lr_fn="match_rms_adamw",
            )
        fused = self._device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=fused)

    @property
    def _all_parts(self) -> list[torch.optim.Optimizer]:
        return [*self._parts, *(one.part for one in self._bf16.values())]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of each rule, its decayed and other parameters; Muon decays all of its own."""
        return [group for part in self._all_parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)
        for parameter, _ in self._flat:  # the optimizers know only the flat views
            parameter.grad = None
        for one in self._bf16.values():
            one.parameter.grad = None

    def step(self, lr: float) -> None:
        """Move the weights."""
        for group in self.param_groups:
            group["lr"] = lr * group["rate"]
        for parameter, flat in self._flat:
            flat.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for part in self._parts:
            part.step()
        moved = 0
        for name, one in self._bf16.items():
            one.step(f"{self._seed} {self._steps} {name}")
            moved += one.parameter.numel()
            if self._device.type == "cpu" and moved >= RETURNED:
                return_memory(self._device)  # glibc keeps holes: a step would take twice the memory
                moved = 0
        self._steps += 1

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The state of each parameter, as `exp_avg.NAME`, sharded as the parameter is; without counters."""
        for part in self._all_parts:
            for parameter, slots in part.state.items():
                for kind, tensor in slots.items():
                    if kind != "step":
                        assert isinstance(parameter, nn.Parameter)
                        yield f"{kind}.{self.names[parameter]}", tensor

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on with what `state` gave, as whole tensors, after `step` steps."""
        self._steps = step
        parameters = {name: parameter for parameter, name in self.names.items()}
        owner = {
            parameter: part
            for part in self._all_parts
            for group in part.param_groups
            for parameter in group["params"]
        }
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            parameter = parameters[name]
            slot = owner[parameter].state[parameter]
            like = replicate_like if kind.endswith(("_row", "_col")) else shard_like
            slot[kind] = like(parameter, tensor)
            if isinstance(owner[parameter], torch.optim.AdamW):
                fused = parameter.device.type == "cuda"
                slot["step"] = torch.tensor(float(step), device=parameter.device if fused else "cpu")
