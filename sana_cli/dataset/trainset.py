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

from sana_cli.dataset.order import Shuffle
from sana_cli.dataset.reader import Dataset
from sana_cli.runtime.records import Origin

Shape = tuple[int, int, int]  # channels, height, width
CHUNKS, GROUPS, STREAMS = range(3)  # what an order is of, in its key
BLOCK = 4096  # images whose order is computed at once


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


@dataclass(frozen=True)
class _Stream:
    """The images of one shape of a part: an endless row of permutations of them."""

    part: int
    shape: int  # its number in the part's dataset
    count: int


@dataclass(frozen=True)
class _Epoch:
    """What an epoch has, by the numbers of streams: where each begins in it, and how many images it takes."""

    firsts: np.ndarray
    counts: np.ndarray


class Mixture:
    """Datasets of one encoder and one kind of sample as a `TrainSet`, in an order drawn from a seed.

    The images of one shape of a dataset are an endless stream of permutations of them. An epoch takes the next
    `times * rows` images of each dataset, of each shape its share, and shuffles them together. So no image is
    dropped, and after any epoch the counts of a dataset's images differ by one at most. With one dataset seen
    once, an epoch is a permutation of it. The place of each image is computed (`order.py`): no list of images is
    kept, and any part of a run is as cheap as its beginning.

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
        self._streams = [
            _Stream(at, shape, count)
            for at, part in enumerate(self.parts)
            for shape, count in enumerate(part.dataset.shapes.values())
        ]
        # streams whose images are shuffled together: all, or those of one shape
        self._groups = [np.arange(len(self._streams))]
        if chunk > 1 and len(self.shapes) > 1:
            shapes = np.array([self._numbers[stream.part][stream.shape] for stream in self._streams])
            self._groups = [np.flatnonzero(shapes == shape) for shape in range(len(self.shapes))]
        self._epoch = lru_cache(maxsize=2)(self._count_epoch)
        self._block = lru_cache(maxsize=2)(self._draw_block)

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
            block, inside = divmod(number - start, BLOCK)
            found.append(self._block(epoch, block)[inside : inside + end - number])
            number += len(found[-1])
        return np.concatenate(found)

    def _count_epoch(self, epoch: int) -> _Epoch:
        firsts, ends = (np.array(self._taken(number), dtype=np.int64) for number in (epoch, epoch + 1))
        return _Epoch(firsts, ends - firsts)

    def _taken(self, epochs: int) -> list[int]:
        """How many images of each stream the first `epochs` epochs have."""
        found = []
        for part in self.parts:
            rows = len(part.dataset)
            times, more = divmod(part.taken(epochs), rows)
            for count in part.dataset.shapes.values():  # of what is left, each shape has its share
                share = more * count // rows
                found.append(times * count + share)
                more, rows = more - share, rows - count
        return found

    def _draw_block(self, epoch: int, block: int) -> np.ndarray:
        """The rows of the `BLOCK` images from `block * BLOCK` of an epoch, fewer at its end."""
        counts = self._epoch(epoch).counts
        places = np.arange(BLOCK * block, min(BLOCK * (block + 1), int(counts.sum())))
        groups, inside = self._grouped(epoch, [int(counts[group].sum()) for group in self._groups], places)
        found = np.empty(len(places), dtype=np.int64)
        for number in np.unique(groups):
            of_group = np.flatnonzero(groups == number)
            found[of_group] = self._of_group(epoch, int(number), inside[of_group])
        return found

    def _grouped(self, epoch: int, counts: list[int], places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The group of each place of an epoch, and its place in that. Groups have these counts, cut into chunks."""
        if len(counts) == 1:
            return np.zeros_like(places), places
        chunks = np.array([-(-count // self.chunk) for count in counts])
        ends = np.cumsum(chunks)
        order = Shuffle(int(ends[-1]), (self.seed, epoch, CHUNKS))
        # the last chunk of a group may be short by a few: what comes after it begins as much earlier
        missing = chunks * self.chunk - counts
        short = np.flatnonzero(missing)
        at = order.places(ends[short] - 1)
        sorting = np.argsort(at)
        lacking = np.cumsum(missing[short][sorting])
        begins = (at[sorting] + 1) * self.chunk - lacking  # what follows each of them
        passed = np.searchsorted(begins, places, side="right")
        shifted = places + np.concatenate([[0], lacking])[passed]
        chunk = order(shifted // self.chunk)
        group = np.searchsorted(ends, chunk, side="right")
        return group, (chunk - (ends - chunks)[group]) * self.chunk + shifted % self.chunk

    def _of_group(self, epoch: int, group: int, places: np.ndarray) -> np.ndarray:
        """The rows at these places of a group in an epoch."""
        here, plan = self._groups[group], self._epoch(epoch)
        ends = np.cumsum(plan.counts[here])
        shuffled = Shuffle(int(ends[-1]), (self.seed, epoch, GROUPS, group))(places)
        which = np.searchsorted(ends, shuffled, side="right")
        inside = shuffled - (ends - plan.counts[here])[which]
        found = np.empty(len(places), dtype=np.int64)
        for at in np.unique(which):
            stream, of_stream = self._streams[here[at]], np.flatnonzero(which == at)
            times, at_place = np.divmod(plan.firsts[here[at]] + inside[of_stream], stream.count)
            for time in np.unique(times):
                of_time = np.flatnonzero(times == time)
                key = (self.seed, int(time), STREAMS, stream.part, stream.shape)
                rows = self.parts[stream.part].dataset.rows_of_shape(
                    stream.shape, Shuffle(stream.count, key)(at_place[of_time])
                )
                found[of_stream[of_time]] = self.row_starts[stream.part] + rows
        return found

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
