"""The published tables of image shapes, and which shape an image takes. It knows no pixels and no dataset.

Shapes are (height, width) in pixels. In the table of a size n, sides are multiples of n / 16,
and no shape has more than n x n pixels. The tables are those of PixArt and SANA (diffusers
`ASPECT_RATIO_1024_BIN` and `ASPECT_RATIO_2048_BIN`). Those of other sizes are the same, scaled.
"""

from collections.abc import Iterable
from functools import lru_cache

Shape = tuple[int, int]

UNITS = 16  # of a side of the square shape
LARGE = 2048  # sizes from here on have the longer table

# heights and widths in units, by falling width: a list, not a formula
_TALLER = (
    (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10),
    (25, 10),
)  # fmt: skip
_WIDER = (
    (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21), (12, 21), (12, 20), (13, 19),
    (13, 18), (14, 18), (14, 17), (15, 17), (15, 16),
)  # fmt: skip
_SMALL_TABLE = ((8, 32), (8, 29), *_WIDER, (16, 16), (16, 15), *_TALLER, (27, 9), (32, 8))
_LARGE_TABLE = (
    *((8, width) for width in range(32, 28, -1)), *_WIDER, (16, 16), (16, 15), *_TALLER,
    (26, 9), (27, 9), (28, 9), *((height, 8) for height in range(29, 33)),
)  # fmt: skip


def unit(size: int) -> int:
    """The pixels that divide every side of a size's shapes.

    Raises:
        ValueError: the size has no table.
    """
    if size < UNITS or size % UNITS:
        raise ValueError(f"{size} has no table of shapes: sizes are multiples of {UNITS}")
    return size // UNITS


@lru_cache
def shapes(size: int) -> tuple[Shape, ...]:
    """The shapes of a size, by rising ratio of height to width."""
    table = _SMALL_TABLE if size < LARGE else _LARGE_TABLE
    return tuple((unit(size) * height, unit(size) * width) for height, width in table)


@lru_cache
def all_shapes(sizes: tuple[int, ...]) -> frozenset[Shape]:
    """The shapes of all these sizes."""
    return frozenset(shape for size in sizes for shape in shapes(size))


def closest(size: int, height: int, width: int) -> Shape:
    """The shape of a size whose ratio is closest to an image's, by the tables' two-decimal keys.

    The distance is linear in height / width, as the published models were trained.
    """
    ratio = height / width
    return min(shapes(size), key=lambda shape: abs(round(shape[0] / shape[1], 2) - ratio))


def choose(sizes: Iterable[int], height: int, width: int, fit: str = "crop") -> Shape:
    """The shape that an image of this height and width takes.

    It is the closest of the largest size that does not enlarge the image, else of the smallest
    size. An image that has a shape already keeps it.
    """
    descending = tuple(sorted(sizes, reverse=True))
    if (height, width) in all_shapes(descending):
        return height, width
    found = (closest(size, height, width) for size in descending[:-1])
    fitting = (shape for shape in found if scale((height, width), shape, fit) <= 1)
    return next(fitting, None) or closest(descending[-1], height, width)


def scale(image: tuple[float, float], shape: Shape, fit: str = "crop") -> float:
    """How much larger an image gets: "crop" covers the shape, "pad" stays inside it."""
    ratios = shape[0] / image[0], shape[1] / image[1]
    return max(ratios) if fit == "crop" else min(ratios)
