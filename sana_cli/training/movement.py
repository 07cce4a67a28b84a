"""How far adapters have moved their layers, so that a run in which nothing happens is seen at once.

Of each kind of layer, such as `attn1.to_q`: the norm of what its adapters add over the norm of its weights, over
all blocks. It knows no files.
"""

from collections import defaultdict

import torch
from torch import nn

from sana_cli.adapters import Change, LowRank, adapted_layers, changes_of, kind_of, squared_norm
from sana_cli.runtime.distributed import whole

TOTAL = "all"


class Movement:
    """Measures the adapters of a model, which may be sharded. All processes of a run call it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.squares = model, dict[str, float]()  # of the layers' own weights, by name
        with torch.no_grad():
            for name, layer in adapted_layers(model).items():
                self.squares[name] = float(whole(layer.weight.float().square().sum()))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """|update| / |weights| of each kind of layer, and of all; empty without adapters."""
        layers, moved, own = (
            adapted_layers(self.model),
            defaultdict[str, float](float),
            defaultdict[str, float](float),
        )
        for name, sharded in changes_of(self.model).items():
            change = _whole(sharded)
            weight = None if change.magnitude is None else whole(layers[name].weight.detach())
            square = squared_norm(change, weight)
            for kind in (kind_of(name), TOTAL):
                moved[kind] += square
                own[kind] += self.squares[name]
        return {kind: (square / own[kind]) ** 0.5 if own[kind] else 0.0 for kind, square in moved.items()}


def _whole(change: Change) -> Change:
    """An adapter in one piece."""
    assert isinstance(change, LowRank), "what is trained is low-rank"
    magnitude = None if change.magnitude is None else whole(change.magnitude.detach())
    return LowRank(whole(change.lora_A.detach()), whole(change.lora_B.detach()), change.scale, magnitude)
