"""The networks of the judge: pictures to a value of each attribute, and to features.

Shapes: n pictures, C H W of one, F features; v values of an attribute.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """A body that computes F features, and a linear layer on them for each attribute."""

    FEATURES: int
    body: nn.Module

    def __init__(self, values: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(self.FEATURES, count) for count in values)

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Pictures (n, C, H, W) in [-1, 1] to logits (n, v) of each attribute and features (n, F)."""
        features = self.body(pixels.contiguous(memory_format=torch.channels_last))
        return [head(features) for head in self.heads], features

    @staticmethod
    def distort(pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures (n, C, H, W) in [-1, 1], changed as in training."""
        raise NotImplementedError


class SmallClassifier(Classifier):
    """Four convolutions with batch norm: for one attribute of grey pictures, such as MNIST's digits."""

    FEATURES = 64

    def __init__(self, channels: int, values: Sequence[int]) -> None:
        body = nn.Sequential(
            _convolution(channels, 16, 5, 2),
            _convolution(16, 32),
            nn.AdaptiveMaxPool2d(8),
            _convolution(32, 64),
            nn.MaxPool2d(2),
            _convolution(64, 64),
            nn.Flatten(),
            *_linear(64 * 16, self.FEATURES),
        )
        super().__init__(values)
        self.body = body

    @staticmethod
    def distort(pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Turn, scale, stretch and shift each picture a little. Empty parts repeat its border."""
        count = len(pixels)

        def between(bound: float) -> Tensor:
            return (2 * torch.rand(count, generator=generator) - 1) * bound

        angle, size, stretch = between(0.2), 1 + between(0.12), 1 + between(0.08)
        rows = [
            torch.stack([size * stretch * angle.cos(), between(0.15) - angle.sin(), between(0.12)], dim=1),
            torch.stack([angle.sin(), size * angle.cos(), between(0.12)], dim=1),
        ]
        grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


class LargeClassifier(Classifier):
    """Five convolutions with batch norm: for several attributes, or for colour.

    An eye may have two pixels, so nothing is pooled at first. Blocks of 2x2 pixels (larger ones
    in pictures above 48 pixels) become channels, which loses nothing and is faster.
    """

    FEATURES = 128

    def __init__(self, channels: int, values: Sequence[int], size: tuple[int, int]) -> None:
        block = 2 * max(1, round(max(size) / 32))
        body = nn.Sequential(
            _Blocks(block),
            _convolution(channels * block**2, 48),
            _convolution(48, 48),
            _convolution(48, 96, 3, 2),
            _convolution(96, 96),
            _convolution(96, 64, 3, 2),
            nn.AdaptiveMaxPool2d(4),
            nn.Flatten(),
            *_linear(64 * 16, self.FEATURES),
        )
        super().__init__(values)
        self.body = body

    @staticmethod
    def distort(pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Move the pictures by a pixel or so, change the light of each, and add noise.

        They are not turned or scaled, which would blur what is small.
        """
        height, width = pixels.shape[2:]
        most = max(1, max(height, width) // 32)
        top, left = torch.randint(2 * most + 1, (2,), generator=generator).tolist()
        wider = F.pad(pixels, (most, most, most, most), mode="replicate")
        moved = wider[:, :, top : top + height, left : left + width]

        def normal(spread: float) -> Tensor:
            return spread * torch.randn(len(pixels), 1, 1, 1, generator=generator)

        noise = torch.randn(pixels.shape, generator=generator) * normal(0.02)
        return moved * (1 + normal(0.02)) + normal(0.02) + noise


class _Blocks(nn.Module):
    """Blocks of pixels as channels, the border repeated where a side is no multiple of the block."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, pixels: Tensor) -> Tensor:
        down, right = (-length % self.side for length in pixels.shape[2:])
        whole = F.pad(pixels, (0, right, 0, down), mode="replicate") if down or right else pixels
        return F.pixel_unshuffle(whole, self.side).contiguous(memory_format=torch.channels_last)


def classifier_for(shape: tuple[int, int, int], values: Sequence[int]) -> Classifier:
    """An untrained classifier of pictures of `shape` (C, H, W), from a fixed seed.

    Args:
        shape: of a picture.
        values: how many each attribute has.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if shape[0] == 1 and len(values) == 1:
            return SmallClassifier(shape[0], values)
        return LargeClassifier(shape[0], values, shape[1:])


def _convolution(into: int, out: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    )


def _linear(into: int, out: int) -> tuple[nn.Module, ...]:
    return nn.Linear(into, out), nn.BatchNorm1d(out), nn.GELU()
