"""What became of images of many shapes: how much was cut off, which were enlarged. It reads no pixels."""

from dataclasses import dataclass

import numpy as np

from sana_cli.dataset.reader import Dataset
from sana_cli.units import human_factor


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
    enlarged: tuple[Enlarged, ...]  # the most first


def report(dataset: Dataset) -> tuple[ShapeReport, ...]:
    """A report for each shape of a dataset with buckets, largest first; none without."""
    image = dataset.index.image
    if image.buckets is None:
        return ()
    originals, numbers = dataset.original_sizes(), dataset.shape_numbers(np.arange(len(dataset)))
    found = []
    for number, (_, height, width) in enumerate(dataset.shapes):
        rows = np.flatnonzero(numbers == number)
        shape = np.array([height, width]) * image.factor
        ratios = shape / originals[rows]
        scale = ratios.max(1) if image.fit == "crop" else ratios.min(1)
        filled = scale**2 * originals[rows].prod(1) / shape.prod()  # of the shape, by the whole image
        shares = np.clip(1 - (1 / filled if image.fit == "crop" else filled), 0, 1)
        order = np.argsort(-scale, kind="stable")[: int((scale > 1).sum())]
        names = dataset.sample_ids(rows[order])
        found.append(
            ShapeReport(
                height=int(shape[0]),
                width=int(shape[1]),
                images=len(rows),
                mean_share=float(shares.mean()),
                worst_share=float(shares.max()),
                enlarged=tuple(map(Enlarged, names, scale[order].tolist())),
            )
        )
    return tuple(found)


def most_enlarged(reports: tuple[ShapeReport, ...], count: int) -> tuple[str, ...]:
    """The names of the most enlarged images of all shapes, with how much."""
    found = [image for one in reports for image in one.enlarged]
    return tuple(
        f"{one.name} {human_factor(one.times)}" for one in sorted(found, key=lambda e: -e.times)[:count]
    )
