"""Which parameters of a transformer move, and the average of those that do. It knows no optimizer.

All of them, or adapters alone: what does not move is neither averaged nor saved, and its memory is shared.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sana_cli.model import SanaTransformer
from sana_cli.runtime.distributed import shard_like


@dataclass(frozen=True)
class Trainable:
    """Which parameters move, are averaged and are saved: by default all."""

    moves: Callable[[str], bool] = lambda _name: True  # by the parameter's name

    def freeze_others(self, model: nn.Module) -> None:
        """Turn off the gradients of parameters that do not move."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.moves(name))

    def of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that move, by name."""
        return {name: tensor for name, tensor in state.items() if self.moves(name)}


class WeightAverage:
    """The exponential moving average of what moves in a model: the weights to sample with.

    It begins as a copy of the model; what does not move is the model's own memory. If nothing is
    `averaged` it is the model itself.
    """

    def __init__(self, model: SanaTransformer, trainable: Trainable, averaged: bool = True) -> None:
        self.weights_of, self.trainable, self.averaged = model, trainable, averaged
        self.model = model
        if averaged:
            still = {id(p): p for name, p in model.named_parameters() if not trainable.moves(name)}
            self.model = deepcopy(model, still).requires_grad_(False).eval()
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None  # walking modules takes milliseconds

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
            weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            copy.load_state_dict(weights, assign=True)
            copy.requires_grad_(False)
        return average

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Go on with an average, whole tensors by name."""
        for name, tensor in self.model.state_dict().items():
            if name in average:
                tensor.copy_(shard_like(tensor, average[name]))

    def update(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weights, for what moves."""
        if not self.averaged:
            return
        if self._pairs is None:
            averages, weights = dict(self.model.named_parameters()), dict(self.weights_of.named_parameters())
            names = [name for name in averages if self.trainable.moves(name)]
            self._pairs = [averages[name] for name in names], [weights[name] for name in names]
        get_ema_multi_avg_fn(decay)(*self._pairs, torch.tensor(1))  # no gradient is recorded in there

    @contextmanager
    def in_use(self) -> Iterator[SanaTransformer]:
        """The model with these weights, for drawing and judging."""
        was_training = self.model.training
        try:
            yield self.model.eval()
        finally:
            self.model.train(was_training)
