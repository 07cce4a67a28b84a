"""What a training run reads: the rows of each step, and the samples and captions of given rows.

A `TrainSet` may be one dataset, several, or one with several sizes: to a trainer they are the same.
It knows no noise and no model.

Shapes: n rows, C H W of a sample, L tokens of a caption, D width of a caption state.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from torch import Tensor

from sana_cli.dataset.reader import Dataset
from sana_cli.runtime.records import Origin

Shape = tuple[int, int, int]  # channels, height, width


class TrainSet(Protocol):
    """Rows and shapes."""

    @property
    def shapes(self) -> Sequence[Shape]:
        """The shapes of its samples, largest first."""

    @property
    def null_caption(self) -> int:
        """The id of the caption ""."""

    def __len__(self) -> int:
        """How many rows there are."""

    def rows(self, first: int, count: int) -> np.ndarray:
        """The rows (n,) of images `first` .. `first + count` of a run: a pure function of these numbers."""

    def shape_numbers(self, rows: np.ndarray) -> np.ndarray:
        """Which of `shapes` each row has, (n,)."""

    def samples(self, rows: np.ndarray) -> Tensor:
        """The samples (n, C, H, W) of rows of one shape, as the transformer sees them, float32."""

    def captions(self, rows: np.ndarray) -> list[tuple[list[int], list[float] | None]]:
        """The caption ids of each row, one at least, and their weights (None: all alike)."""

    def states(self, caption_ids: Iterable[int]) -> list[Tensor]:
        """The states (L, D) of each caption."""

    def names(self, rows: np.ndarray) -> list[str]:
        """What the source calls each row, for messages."""

    def record(self) -> Origin:
        """What a checkpoint remembers of it."""


class SingleDataset:
    """One dataset as a `TrainSet`: each epoch is a permutation of its own, drawn from `seed`."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.shapes = (dataset.image_shape,)
        self.null_caption = dataset.index.null_caption
        self.states, self.samples, self.names = dataset.states, dataset.images, dataset.sample_ids

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, first: int, count: int) -> np.ndarray:
        """`shuffled_rows` of the dataset."""
        return shuffled_rows(first, count, len(self), self.seed)

    def shape_numbers(self, rows: np.ndarray) -> np.ndarray:
        """All alike."""
        return np.zeros(len(rows), dtype=np.int64)

    def captions(self, rows: np.ndarray) -> list[tuple[list[int], list[float] | None]]:
        """As the dataset has them."""
        return list(zip(self.dataset.caption_ids(rows), self.dataset.caption_weights(rows), strict=True))

    def record(self) -> Origin:
        """Its hash and size."""
        return Origin(sha256=self.dataset.index.sha256, images=len(self))


def shuffled_rows(first: int, count: int, length: int, seed: int) -> np.ndarray:
    """The rows of images `first` .. `first + count` of a run: each epoch a permutation of its own.

    A pure function of its arguments: resuming needs no state, and steps run on over the ends of epochs.
    """
    positions = np.arange(first, first + count)
    rows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(positions // length):
        inside = positions // length == epoch
        rows[inside] = _permutation(length, seed, int(epoch))[positions[inside] % length]
    return rows


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(length)
