"""What moves the weights: AdamW, Muon, the schedule of the learning rate and the weight average. It knows no files.

Optimizer state is named after the parameter it belongs to, and is whole in a checkpoint however the parameters are
sharded.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sana_cli.config.keys import TrainConfig
from sana_cli.model import SanaTransformer
from sana_cli.runtime.distributed import shard_like

TABLE = "scale_shift_table"


def lr_factor(train: TrainConfig, step: int) -> float:
    """The learning rate of the step after `step`, over the peak: linear warm-up, then constant, cosine or linear decay."""
    if step < train.warmup:
        return (step + 1) / train.warmup
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if train.schedule == "linear" else 1.0


def ema_decay(train: TrainConfig, step: int) -> float:
    """Decay of the weight average at the update after `step`: young averages forget faster."""
    return min(train.ema_decay, (1 + step) / (10 + step))


class WeightAverage:
    """The exponential moving average of a model's weights: those to sample with.

    It begins as a copy, which must be made before the model is sharded: sharded modules cannot be copied.
    """

    def __init__(self, model: SanaTransformer) -> None:
        self._averaged = AveragedModel(model)
        self._averaged.n_averaged.fill_(1)  # else the first update would be a plain copy
        self._averaged.requires_grad_(False).eval()
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None  # asked for once: going through modules takes milliseconds

    @property
    def model(self) -> SanaTransformer:
        """The model that carries the average."""
        module = self._averaged.module
        assert isinstance(module, SanaTransformer)
        return module

    def update(self, model: nn.Module, decay: float) -> None:
        """average = decay * average + (1 - decay) * weights."""
        if self._pairs is None:
            self._pairs = list(self.model.parameters()), list(model.parameters())
        get_ema_multi_avg_fn(decay)(*self._pairs, self._averaged.n_averaged)  # no gradient is recorded in there


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for it: matrices and convolutions, not biases, norms and tables."""
    return parameter.ndim >= 2 and not name.endswith(TABLE)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is for it: a matrix inside a block. The 1x1 convolutions of the Mix-FFN are matrices too.

    Embedders, the output layer and the depthwise convolution, whose rows share nothing, stay with AdamW
    (kellerjordan.github.io/posts/muon).
    """
    inside = name.startswith("transformer_blocks.") and not name.endswith(TABLE)
    return inside and (parameter.ndim == 2 or (parameter.ndim == 4 and parameter.shape[1] > 1 and parameter.shape[2:] == (1, 1)))


class Optimizer:
    """AdamW on everything, or Muon on the matrices inside blocks and AdamW on the rest.

    Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that one learning rate and one weight
    decay serve both.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, device: torch.device) -> None:
        named = dict(model.named_parameters())
        muon = {name for name, p in named.items() if train.optimizer == "muon" and is_hidden_matrix(name, p)}
        self.names = {parameter: name for name, parameter in named.items() if name not in muon}
        self._flat: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}  # a 1x1 convolution, and itself as a matrix
        groups: list[dict[str, object]] = [
            {"params": [p for p in self.names if is_matrix(self.names[p], p)], "weight_decay": train.weight_decay},
            {"params": [p for p in self.names if not is_matrix(self.names[p], p)], "weight_decay": 0.0},
        ]
        fused = device.type in ("cpu", "cuda")
        self._parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, fused=fused)]
        if muon:
            matrices = []
            for name in sorted(muon):
                parameter = named[name]
                if parameter.ndim == 4:  # torch's Muon takes two dimensions only
                    flat = nn.Parameter(parameter.detach().flatten(1))  # the same memory
                    self._flat[name] = parameter, flat
                    parameter = flat
                matrices.append(parameter)
                self.names[parameter] = name
            self._parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=train.lr,
                    weight_decay=train.weight_decay,
                    momentum=train.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    @property
    def param_groups(self) -> list[dict[str, object]]:
        """Of all parts: the decayed and the others of AdamW, then Muon's."""
        return [group for part in self._parts for group in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none=True)
        for parameter, _ in self._flat.values():  # the parts know their flat views alone
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
        """What it remembers of each parameter, as `exp_avg.NAME`, sharded as the parameter is. Counters are left out."""
        for part in self._parts:
            for parameter, slots in part.state.items():
                for kind, tensor in slots.items():
                    if kind != "step":
                        assert isinstance(parameter, nn.Parameter)
                        yield f"{kind}.{self.names[parameter]}", tensor

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Take up what `state` gave, whole tensors, after `step` steps."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        owner = {parameter: part for part in self._parts for group in part.param_groups for parameter in group["params"]}
        for key, tensor in state.items():
            kind, _, name = key.partition(".")
            parameter = parameters[name]
            slot = owner[parameter].state[parameter]
            slot[kind] = shard_like(parameter, tensor)
            if kind.startswith("exp_avg"):
                fused = parameter.device.type == "cuda"
                slot["step"] = torch.tensor(float(step), device=parameter.device if fused else "cpu")


def optimizer_numbers(model: nn.Module, train: TrainConfig) -> int:
    """How many numbers the optimizer remembers: one for each weight that Muon moves, two for each of AdamW's."""
    named = model.named_parameters()
    return sum(p.numel() * (1 if train.optimizer == "muon" and is_hidden_matrix(name, p) else 2) for name, p in named)
