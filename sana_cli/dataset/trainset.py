"""What a training run reads: the rows of each step, and the samples and captions of given rows.

A `TrainSet` may be one dataset or several, of one shape or many: to a trainer they are the same.
The order is a pure function of the seed and the number of an image in the run, so resuming needs
no state. It knows no noise and no model.

Shapes: n rows, C H W of a sample, L tokens of a caption, D width of a caption state.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sana_cli.dataset.reader import Dataset
from sana_cli.runtime.records import Origin

Shape = tuple[int, int, int]  # channels, height, width
CHUNKS, STREAMS = 1, 2  # uses of the generator for the order of rows, beside that of epochs, 0


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


@dataclass(frozen=True)
class Part:
    """A dataset of a run, and how often an epoch has each of its images."""

    dataset: Dataset
    times: float = 1.0

    @cached_property
    def images(self) -> Fraction:
        """How many of its images an epoch has, on average: exact, so that rounding adds nothing up."""
        return Fraction(str(self.times)) * len(self.dataset)

    def taken(self, epochs: int) -> int:
        """How many images the first `epochs` epochs have."""
        return math.floor(epochs * self.images)


class Mixture:
    """Datasets of one encoder and one kind of sample as a `TrainSet`, in an order drawn from a seed.

    Each dataset is an endless stream of permutations of its rows. An epoch takes the next
    `times * rows` of each stream and shuffles them together. So no image is dropped, and after any
    epoch the counts of a dataset's images differ by one at most. With one dataset seen once, an
    epoch is a permutation of it.

    Rows and caption ids are those of the parts, one part after the other.
    """

    def __init__(self, parts: Sequence[Part], seed: int, chunk: int = 1) -> None:
        """`chunk` images of one shape follow each other, fewer where a shape ends; 1: a plain shuffle."""
        self.parts, self.seed, self.chunk = tuple(parts), seed, chunk
        self.row_starts = np.cumsum([0, *(len(part.dataset) for part in parts)])
        self.caption_starts = np.cumsum([0, *(part.dataset.index.counts.captions for part in parts)])
        self.null_caption = parts[0].dataset.index.null_caption
        every = {shape for part in parts for shape in part.dataset.shapes}
        self.shapes = tuple(sorted(every, key=lambda shape: (-shape[1] * shape[2], shape)))
        number = {shape: at for at, shape in enumerate(self.shapes)}
        self._numbers = [np.array([number[shape] for shape in part.dataset.shapes]) for part in parts]
        self._order = lru_cache(maxsize=2)(self._draw_epoch)

    def __len__(self) -> int:
        return int(self.row_starts[-1])

    @property
    def images_per_epoch(self) -> float:
        """How many images an epoch has, on average."""
        return float(sum(part.images for part in self.parts))

    def starts(self, epoch: int) -> int:
        """The number in the run of the first image of an epoch."""
        return sum(part.taken(epoch) for part in self.parts)

    def epoch_of(self, number: int) -> int:
        """The epoch that has image `number` of the run."""
        each = sum(part.images for part in self.parts)
        epoch = math.floor(number / each)  # or a later one: `starts` may be less than epoch * each
        while self.starts(epoch + 1) <= number:
            epoch += 1
        return epoch

    def rows(self, first: int, count: int) -> np.ndarray:
        """The rows of these images, epoch by epoch."""
        found, number = [np.empty(0, dtype=np.int64)], first
        while number < first + count:
            epoch = self.epoch_of(number)
            start, end = self.starts(epoch), min(self.starts(epoch + 1), first + count)
            found.append(self._order(epoch)[number - start : end - start])
            number = end
        return np.concatenate(found)

    def _draw_epoch(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in their order."""
        taken = []
        for number, part in enumerate(self.parts):
            first, end = part.taken(epoch), part.taken(epoch + 1)
            rows = shuffled_rows(first, end - first, len(part.dataset), self.seed, STREAMS + number)
            taken.append(self.row_starts[number] + np.sort(rows))
        there = np.concatenate(taken)
        shuffled: np.ndarray = there[_permutation(len(there), self.seed, epoch)]
        if self.chunk == 1 or len(self.shapes) == 1:
            return shuffled
        numbers = self.shape_numbers(shuffled)
        chunks = [
            rows[at : at + self.chunk]
            for rows in (shuffled[numbers == number] for number in range(len(self.shapes)))
            for at in range(0, len(rows), self.chunk)
        ]
        return np.concatenate([chunks[at] for at in _permutation(len(chunks), self.seed, epoch, CHUNKS)])

    def _split(self, rows: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """By part of rows or caption ids: the part's number, their places, their numbers inside it."""
        numbers = np.searchsorted(starts, rows, side="right") - 1
        for number in np.unique(numbers):
            places = np.flatnonzero(numbers == number)
            yield int(number), places, rows[places] - starts[number]

    def shape_numbers(self, rows: np.ndarray) -> np.ndarray:
        """Which of `shapes` each row has, (n,)."""
        found = np.empty(len(rows), dtype=np.int64)
        for part, places, inside in self._split(rows, self.row_starts):
            found[places] = self._numbers[part][self.parts[part].dataset.shape_numbers(inside)]
        return found

    def samples(self, rows: np.ndarray) -> Tensor:
        """The samples (n, C, H, W) of rows of one shape, float32."""
        split = list(self._split(rows, self.row_starts))
        found = torch.cat([self.parts[part].dataset.images(inside) for part, _, inside in split])
        return found[np.argsort(np.concatenate([places for _, places, _ in split]))]

    def captions(self, rows: np.ndarray) -> list[tuple[list[int], list[float] | None]]:
        """The caption ids of each row, and their weights."""
        found: dict[int, tuple[list[int], list[float] | None]] = {}
        for part, places, inside in self._split(rows, self.row_starts):
            dataset, before = self.parts[part].dataset, int(self.caption_starts[part])
            both = zip(dataset.caption_ids(inside), dataset.caption_weights(inside), strict=True)
            for place, (ids, weights) in zip(places.tolist(), both, strict=True):
                found[place] = [before + caption_id for caption_id in ids], weights
        return [found[place] for place in range(len(rows))]

    def states(self, caption_ids: Iterable[int]) -> list[Tensor]:
        """The states (L, D) of each caption."""
        found: dict[int, Tensor] = {}
        for part, places, inside in self._split(
            np.array(list(caption_ids), dtype=np.int64), self.caption_starts
        ):
            states = self.parts[part].dataset.states(inside.tolist())
            found |= dict(zip(places.tolist(), states, strict=True))
        return [found[place] for place in sorted(found)]

    def names(self, rows: np.ndarray) -> list[str]:
        """What the source calls each row."""
        found: dict[int, str] = {}
        for part, places, inside in self._split(rows, self.row_starts):
            found |= dict(zip(places.tolist(), self.parts[part].dataset.sample_ids(inside), strict=True))
        return [found[place] for place in sorted(found)]

    def record(self) -> Origin:
        """Its hash and size. Of one dataset seen once these are its own; else of all and their times."""
        if len(self.parts) == 1 and self.parts[0].times == 1:
            return Origin(sha256=self.parts[0].dataset.index.sha256, images=len(self))
        content = json.dumps([(part.dataset.index.sha256, str(part.images)) for part in self.parts])
        return Origin(sha256=hashlib.sha256(content.encode()).hexdigest(), images=len(self))


class SingleDataset(Mixture):
    """One dataset as a `TrainSet`: each epoch is a permutation of its own, drawn from `seed`."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        super().__init__([Part(dataset)], seed)
        self.dataset = dataset


def shuffled_rows(first: int, count: int, length: int, seed: int, use: int = 0) -> np.ndarray:
    """Rows `first` .. `first + count` of an endless stream of permutations of `length` rows."""
    found, at, end = [np.empty(0, dtype=np.int64)], first, first + count
    while at < end:
        number, inside = divmod(at, length)
        found.append(_permutation(length, seed, number, use)[inside : inside + end - at])
        at += len(found[-1])
    return np.concatenate(found)


def _permutation(length: int, seed: int, number: int, use: int = 0) -> np.ndarray:
    """A permutation that depends on these alone. `use`: 0 for epochs, CHUNKS, or STREAMS + part."""
    return np.random.Generator(np.random.Philox(key=[seed, number], counter=[0, 0, use, 0])).permutation(
        length
    )
