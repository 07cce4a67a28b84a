"""The critic of distillation, which tells drawn samples from real ones. It knows no loss, teacher or data.

It sees one image at a time: there are no statistics over a batch, so a step may be cut anyhow.
Shapes: B images, N tokens of an image.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of leaky ReLU


class Critic(nn.Module):
    """Heads on the token states of some blocks of a teacher (LADD, arXiv 2403.12015).

    The published heads normalise over a batch of images; these do so over each token.
    """

    def __init__(self, blocks: int, dim: int, width: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_Head(dim, width) for _ in range(blocks))

    def forward(self, features: Sequence[Tensor], height: int) -> Tensor:
        """Logits (B, N heads) of token states (B, N, dim) of each block, with `height` rows of tokens."""
        return torch.cat(
            [head(states, height) for head, states in zip(self.heads, features, strict=True)], dim=1
        )


class _Head(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.first = nn.Conv2d(dim, width, 1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.logit = nn.Conv2d(width, 1, 1)

    def forward(self, states: Tensor, height: int) -> Tensor:
        x = self.norm(states).transpose(1, 2).unflatten(2, (height, -1))
        x = F.leaky_relu(self.first(x), SLOPE)
        x = x + F.leaky_relu(self.second(x), SLOPE)
        return self.logit(x).flatten(1)


@torch.no_grad()
def draw_weights(critic: nn.Module, generator: torch.Generator) -> None:
    """Draw the initial weights of linear layers and convolutions, uniform in +-1 / sqrt(fan-in), as PyTorch does.

    PyTorch's own draw is from a global generator: no two runs would be alike.
    """
    for module in critic.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
