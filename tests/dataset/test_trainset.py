"""The order of rows in a run."""

from collections import Counter
from fractions import Fraction
from types import SimpleNamespace
from typing import cast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_cli.dataset.reader import Dataset
from sana_cli.dataset.trainset import Mixture, Part


def fake(shapes: list[int], sha256: str = "a") -> Dataset:
    """A dataset without tensors: the shape of each row, as a number from 0."""
    numbers = np.array(shapes)
    listed = {(1, side, side): shapes.count(8 - side) for side in range(8, 8 - len(set(shapes)), -1)}

    class Rows:
        index = SimpleNamespace(null_caption=0, sha256=sha256, counts=SimpleNamespace(captions=3))
        shapes = listed

        def __len__(self) -> int:
            return len(numbers)

        def shape_numbers(self, rows: np.ndarray) -> np.ndarray:
            return np.asarray(numbers[rows])

        def rows_of_shape(self, number: int, places: np.ndarray) -> np.ndarray:
            return np.flatnonzero(numbers == number)[places]

    return cast("Dataset", Rows())


SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=30).map(
    lambda drawn: [sorted(set(drawn)).index(one) for one in drawn]  # numbers without gaps
)
SEED = st.integers(0, 2**62)


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, seed=SEED, chunk=st.integers(1, 9), first=st.integers(0, 90), count=st.integers(1, 70))
def test_the_order_of_one_dataset(shapes: list[int], seed: int, chunk: int, first: int, count: int) -> None:
    length = len(shapes)
    train_set = Mixture([Part(fake(shapes))], seed, chunk)
    rows = train_set.rows(first, count)
    for epoch in range(2):
        order = train_set.rows(epoch * length, length)
        assert sorted(order) == list(range(length))
        numbers = train_set.shape_numbers(order)
        sizes = [len(run) for run in np.split(numbers, np.flatnonzero(np.diff(numbers)) + 1)]
        fewest = sum(-(-count // chunk) for count in Counter(shapes).values())
        assert len(sizes) <= (fewest if len(set(shapes)) > 1 and chunk > 1 else length)
    again = Mixture([Part(fake(shapes))], seed, chunk)
    one_by_one = [int(again.rows(at, 1)[0]) for at in range(first + count - 1, first - 1, -1)]
    assert one_by_one[::-1] == rows.tolist()


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(
        st.tuples(SHAPES, st.sampled_from([0.01, 0.1, 0.25, 1 / 3, 0.5, 1.0, 1.5, 2.0, 3.7])),
        min_size=1,
        max_size=3,
    ),
    seed=SEED,
    chunk=st.integers(1, 5),
    epochs=st.integers(1, 8),
)
def test_weights_are_occurrences(
    parts: list[tuple[list[int], float]], seed: int, chunk: int, epochs: int
) -> None:
    """After any epochs each part has had its share, to the image, and its images alike, to one."""
    train_set = Mixture([Part(fake(shapes), times) for shapes, times in parts], seed, chunk)
    ends = [0]
    for epoch in range(1, epochs + 1):
        shares = [int(epoch * Fraction(str(times)) * len(shapes)) for shapes, times in parts]
        ends.append(sum(shares))
        assert train_set.starts(epoch) == ends[-1]
        counts = Counter(train_set.rows(0, ends[-1]).tolist())
        begin = 0
        for (shapes, _), share in zip(parts, shares, strict=True):
            own = [counts[row] for row in range(begin, begin + len(shapes))]
            assert sum(own) == share
            assert max(own) - min(own) <= 1
            begin += len(shapes)
    for number in range(ends[-1]):
        epoch = train_set.epoch_of(number)
        assert ends[epoch] <= number < ends[epoch + 1]


def test_chunks_are_of_one_shape_and_whole() -> None:
    shapes = [0] * 40 + [1] * 13 + [2] * 3
    order = Mixture([Part(fake(shapes))], 5, 4).rows(0, 56)
    numbers = np.array(shapes)[order]
    at, cut = 0, []
    while at < len(order):  # read greedily: a chunk ends where the shape or four images do
        end = at
        while end < len(order) and end - at < 4 and numbers[end] == numbers[at]:
            end += 1
        cut.append((numbers[at], end - at))
        at = end
    assert sum(size == 4 for shape, size in cut if shape == 0) >= 9
    assert sum(size for shape, size in cut if shape == 2) == 3
    assert len(cut) <= 10 + 4 + 1 + 1
    plain = Mixture([Part(fake(shapes))], 5, 1).rows(0, 56)
    assert sum(np.diff(np.array(shapes)[plain]) == 0) < 40, "shapes are mixed"
    assert order.tolist() != plain.tolist()


def test_what_is_recorded_names_every_part() -> None:
    alone = Mixture([Part(fake([0] * 3, "one"))], 0).record()
    assert (alone.sha256, alone.images) == ("one", 3)
    records = [
        Mixture(parts, 0).record()
        for parts in (
            [Part(fake([0] * 3, "one"), 2.0)],
            [Part(fake([0] * 3, "one"), 3.0)],
            [Part(fake([0] * 3, "one")), Part(fake([0], "two"))],
            [Part(fake([0] * 3, "one")), Part(fake([0], "two"), 0.5)],
            [Part(fake([0] * 3, "one")), Part(fake([0], "three"))],
        )
    ]
    assert len({record.sha256 for record in records} | {"one"}) == 6
    assert [record.images for record in records] == [3, 3, 4, 4, 4]
