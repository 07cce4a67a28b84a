"""Which parameters of a transformer move, and the average of those that do. It knows no optimizer.

All of them, or adapters alone: what does not move is not averaged, and its memory is shared.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sana_cli.kernels import uncompiled
from sana_cli.model import SanaTransformer, is_matrix
from sana_cli.runtime.distributed import shard_like


@dataclass(frozen=True)
class Trainable:
    """Which parameters move, are averaged and are saved, by name: by default all."""

    moves: Callable[[str], bool] = lambda _name: True
    keeps: Callable[[str], bool] | None = None  # what is saved; None: what moves

    def freeze_others(self, model: nn.Module) -> None:
        """Turn off the gradients of parameters that do not move."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.moves(name))

    def to_bf16(self, model: nn.Module) -> None:
        """Keep the matrices and convolutions that move in bf16. Biases, norms and tables stay as they are."""
        for name, parameter in model.named_parameters():
            if self.moves(name) and is_matrix(name, parameter):
                parameter.data = parameter.data.to(torch.bfloat16)

    def of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that are saved, by name."""
        keeps = self.keeps or self.moves
        return {name: tensor for name, tensor in state.items() if keeps(name)}


class WeightAverage:
    """The exponential moving average of what moves in a model, float32: the weights to sample with.

    It begins as a copy of the model; what does not move is the model's own memory. If nothing is
    `averaged` it is the model itself.
    """

    def __init__(
        self,
        model: SanaTransformer,
        trainable: Trainable,
        averaged: bool = True,
        home: torch.device | None = None,
    ) -> None:
        """`home` is the device that the averages lie on; None: that of the weights."""
        self.weights_of, self.trainable, self.averaged = model, trainable, averaged
        self.model = model
        if averaged:

            def averaged_of(name: str, weight: nn.Parameter) -> nn.Parameter:
                if not trainable.moves(name):
                    return weight
                copy = weight.detach().to(home or weight.device, torch.float32, copy=True)
                return nn.Parameter(copy, requires_grad=False)

            memo = {id(p): averaged_of(name, p) for name, p in model.named_parameters()}
            self.model = deepcopy(model, memo).requires_grad_(False).eval()
        self._known: list[tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of_shards(
        cls,
        model: SanaTransformer,
        trainable: Trainable,
        averaged: bool,
        shard: Callable[[SanaTransformer], None],
    ) -> Self:
        """The average of a model that `shard` cuts into shards. No process holds a second whole copy."""
        empty = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
        copy = deepcopy(model, empty).eval() if averaged else model  # sharded modules cannot be copied
        shard(model)
        average = cls(model, trainable, averaged=False)
        average.averaged, average.model = averaged, copy
        if averaged:
            shard(copy)
            weights = {
                name: tensor.detach().clone() if trainable.moves(name) else tensor.detach()
                for name, tensor in model.state_dict().items()
            }
            copy.load_state_dict(weights, assign=True)
            copy.requires_grad_(False)
        return average

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Go on with an average, whole tensors by name."""
        for name, tensor in self.model.state_dict().items():
            if name in average:
                tensor.copy_(shard_like(tensor, average[name]))

    @property
    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The average and the weight of each parameter that moves."""
        if self._known is None:  # walking modules takes milliseconds
            weights = dict(self.weights_of.named_parameters())
            named = self.model.named_parameters() if self.averaged else ()
            self._known = [(average, weights[name]) for name, average in named if self.trainable.moves(name)]
        return self._known

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weights, for what moves."""
        alike = [pair for pair in self._pairs if _is_like(*pair)]
        if alike:
            averages, weights = map(list, zip(*alike, strict=True))
            get_ema_multi_avg_fn(decay)(averages, weights, torch.tensor(1))
        for average, weight in self._pairs:
            if not _is_like(average, weight):  # one at a time: a copy of all weights would need room
                average.lerp_(weight.to(average), 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[SanaTransformer]:
        """The model with these weights, for drawing and judging: on the weights' device, in their type."""
        was_training, at_home = self.model.training, []
        try:
            for average, weight in self._pairs:
                if not _is_like(average, weight):
                    at_home.append((average, average.data))
                    average.data = average.data.to(weight)
            with uncompiled(self.model):
                yield self.model.eval()
        finally:
            for average, data in at_home:
                average.data = data
            self.model.train(was_training)


def _is_like(average: Tensor, weight: Tensor) -> bool:
    """Whether an average lies where its weight does, in the same type."""
    return (average.device, average.dtype) == (weight.device, weight.dtype)
