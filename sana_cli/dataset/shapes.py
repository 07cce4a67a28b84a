"""What became of images of many shapes: how much was cut off, which were enlarged. It reads no pixels."""

import heapq
from dataclasses import dataclass, field

import numpy as np

from sana_cli.dataset.reader import Dataset
from sana_cli.units import human_factor

NAMED = 1_000  # images of each shape that are named: of many millions, all could be enlarged


@dataclass(frozen=True)
class Enlarged:
    """An image that was smaller than its shape."""

    name: str
    times: float  # 1.7: 70 % longer sides


@dataclass(frozen=True)
class ShapeReport:
    """The images of one shape."""

    height: int  # in pixels
    width: int
    images: int
    mean_share: float  # of an image cut off; with data.fit pad, of the result that is white
    worst_share: float
    enlarged: int  # images that were smaller
    most_enlarged: tuple[Enlarged, ...]  # NAMED of them, the most first


@dataclass
class _Tally:
    """What is known of a shape, shard by shard."""

    images: int = 0
    shares: float = 0.0  # added up
    worst: float = 0.0
    enlarged: int = 0
    most: list[tuple[float, int]] = field(default_factory=list)  # -times and row

    def add(self, first: int, scale: np.ndarray, shares: np.ndarray) -> None:
        """Count images from row `first` on."""
        self.images += len(scale)
        self.shares += float(shares.sum())
        self.worst = max(self.worst, float(shares.max(initial=0)))
        self.enlarged += int((scale > 1).sum())
        order = np.argsort(-scale, kind="stable")[:NAMED]
        here = [(-float(scale[row]), first + int(row)) for row in order if scale[row] > 1]
        self.most = heapq.nsmallest(NAMED, self.most + here)


def report(dataset: Dataset) -> tuple[ShapeReport, ...]:
    """A report for each shape of a dataset with buckets, largest first; none without."""
    image = dataset.index.image
    if image.buckets is None:
        return ()
    shapes = [np.array([height, width]) * image.factor for _, height, width in dataset.shapes]
    tallies = [_Tally() for _ in shapes]
    for first, originals in dataset.original_sizes():
        (number,) = dataset.shape_numbers(np.array([first]))
        ratios = shapes[number] / originals
        scale = ratios.max(1) if image.fit == "crop" else ratios.min(1)
        filled = scale**2 * originals.prod(1) / shapes[number].prod()  # of the shape, by the whole image
        shares = np.clip(1 - (1 / filled if image.fit == "crop" else filled), 0, 1)
        tallies[number].add(first, scale, shares)
    return tuple(
        ShapeReport(
            height=int(shape[0]),
            width=int(shape[1]),
            images=tally.images,
            mean_share=tally.shares / tally.images,
            worst_share=tally.worst,
            enlarged=tally.enlarged,
            most_enlarged=tuple(
                Enlarged(name, -times)
                for name, (times, _) in zip(
                    dataset.sample_ids(np.array([row for _, row in tally.most], dtype=np.int64)),
                    tally.most,
                    strict=True,
                )
            ),
        )
        for shape, tally in zip(shapes, tallies, strict=True)
    )


def most_enlarged(reports: tuple[ShapeReport, ...], count: int) -> tuple[str, ...]:
    """The names of the most enlarged images of all shapes, with how much."""
    found = [image for one in reports for image in one.most_enlarged]
    return tuple(
        f"{one.name} {human_factor(one.times)}" for one in sorted(found, key=lambda e: -e.times)[:count]
    )
