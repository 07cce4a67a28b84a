"""AdamW, Muon and the schedules of learning rate and weight average. It knows no model and no files.

Optimizer state has the names of its parameters, and is whole in a checkpoint however parameters are sharded.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sana_cli.config.keys import OptimConfig
from sana_cli.runtime.distributed import shard_like

TABLE = "scale_shift_table"


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


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter decays: matrices and convolutions do, biases, norms and tables do not."""
    return parameter.ndim >= 2 and not name.endswith(TABLE)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon moves a parameter: a matrix, or a 1x1 convolution of the Mix-FFN, inside a block.

    Embedders, the output layer and the depthwise convolution, whose rows share nothing, stay with AdamW
    (kellerjordan.github.io/posts/muon).
    """
    inside = name.startswith("transformer_blocks.") and not name.endswith(TABLE)
    return inside and (
        parameter.ndim == 2
        or (parameter.ndim == 4 and parameter.shape[1] > 1 and parameter.shape[2:] == (1, 1))
    )


class Optimizer:
    """AdamW on everything, or Muon on the matrices inside blocks and AdamW on the rest.

    Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that one learning
    rate and one weight decay serve both.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], optim: OptimConfig, device: torch.device) -> None:
        """Move the parameters of these names."""
        muon = {name for name, p in named.items() if optim.optimizer == "muon" and is_hidden_matrix(name, p)}
        self.names = {parameter: name for name, parameter in named.items() if name not in muon}
        self._flat: dict[
            str, tuple[nn.Parameter, nn.Parameter]
        ] = {}  # a 1x1 convolution, and itself as a matrix
        groups: list[dict[str, object]] = [
            {
                "params": [p for p in self.names if is_matrix(self.names[p], p)],
                "weight_decay": optim.weight_decay,
            },
            {"params": [p for p in self.names if not is_matrix(self.names[p], p)], "weight_decay": 0.0},
        ]
        fused = device.type in ("cpu", "cuda")
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=fused)
        ]
        if muon:
            matrices = []
            for name in sorted(muon):
                parameter = named[name]
                if parameter.ndim == 4:  # torch's Muon takes matrices only
                    flat = nn.Parameter(parameter.detach().flatten(1))  # the same memory
                    self._flat[name] = parameter, flat
                    parameter = flat
                matrices.append(parameter)
                self.names[parameter] = name
            self._parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=optim.lr,
                    weight_decay=optim.weight_decay,
                    momentum=optim.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    @property
    def param_groups(self) -> list[dict[str, object]]:
        """AdamW's decayed and other parameters, then Muon's."""
        return [group for part in self._parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)
        for parameter, _ in self._flat.values():  # the optimizers know only the flat views
            parameter.grad = None

    def step(self, lr: float) -> None:
        """Move the weights."""
        for parameter, flat in self._flat.values():
            flat.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """The state of each parameter, as `exp_avg.NAME`, sharded as the parameter is; without counters."""
        for part in self._parts:
            for parameter, slots in part.state.items():
                for kind, tensor in slots.items():
                    if kind != "step":
                        assert isinstance(parameter, nn.Parameter)
                        yield f"{kind}.{self.names[parameter]}", tensor

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on with what `state` gave, as whole tensors, after `step` steps."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        owner = {
            parameter: part
            for part in self._parts
            for group in part.param_groups
            for parameter in group["params"]
        }
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            parameter = parameters[name]
            slot = owner[parameter].state[parameter]
            slot[kind] = shard_like(parameter, tensor)
            if kind.startswith("exp_avg"):
                fused = parameter.device.type == "cuda"
                slot["step"] = torch.tensor(float(step), device=parameter.device if fused else "cpu")


def optimizer_numbers(named: Iterable[tuple[str, Tensor]], optim: OptimConfig) -> int:
    """How many numbers the optimizer state has: one for each weight of Muon's, two for each of AdamW's."""
    return sum(
        p.numel() * (1 if optim.optimizer == "muon" and is_hidden_matrix(name, p) else 2) for name, p in named
    )
