"""Permutations that are computed: every number once, each order as likely as another, and the way back."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana_cli.dataset.order import Shuffle


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 700), key=st.lists(st.integers(0, 2**62), max_size=3))
def test_every_number_once_and_the_way_back(length: int, key: list[int]) -> None:
    shuffle, places = Shuffle(length, tuple(key)), np.arange(length)
    order = shuffle(places)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(length))
    assert shuffle.places(order).tolist() == places.tolist()
    assert [int(shuffle(places[at : at + 1])[0]) for at in range(length)] == order.tolist()


def test_the_order_is_the_same_on_every_machine() -> None:
    pinned = [0, 7, 3, 8, 6, 1, 9, 5, 4, 2]
    assert Shuffle(10, (3, 0))(np.arange(10)).tolist() == pinned
    assert Shuffle(10, (3, 1))(np.arange(10)).tolist() != pinned


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_each_order_of_a_few_is_as_likely_as_another(length: int) -> None:
    """Chi-square against equal shares of all n! orders."""
    draws = 200 * len(list(itertools.permutations(range(length))))
    counts = Counter(tuple(Shuffle(length, (seed,))(np.arange(length)).tolist()) for seed in range(draws))
    orders = draws // 200
    assert len(counts) == orders
    statistic = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert statistic < orders - 1 + 5 * (2 * (orders - 1)) ** 0.5 + 5


def test_places_and_neighbours_tell_nothing() -> None:
    length = 5000
    for seed in range(5):
        order = Shuffle(length, (seed, 0))(np.arange(length))
        other = Shuffle(length, (seed, 1))(np.arange(length))
        for one, two in ((order, np.arange(length)), (order[1:], order[:-1]), (order, other)):
            assert abs(np.corrcoef(one, two)[0, 1]) < 5 / length**0.5
        # of a random order about one number stays, and one is followed by the next
        assert (order == np.arange(length)).sum() <= 8
        assert (np.diff(order) == 1).sum() <= 8
        # each tenth of the places has a tenth of every tenth of the values
        table = np.histogram2d(np.arange(length), order, bins=10)[0]
        assert ((table - length / 100) ** 2 / (length / 100)).sum() < 81 + 5 * 162**0.5


def test_no_list_is_kept() -> None:
    length = 10**15
    tracemalloc.start()
    shuffle = Shuffle(length, (7,))
    places = np.array([0, 1, length - 1])
    order = shuffle(places)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert shuffle.places(order).tolist() == places.tolist()
    assert ((order >= 0) & (order < length)).all()
