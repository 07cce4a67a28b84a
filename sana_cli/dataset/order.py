"""Which rows of a dataset a training run sees, in which order."""

from functools import lru_cache

import numpy as np


def sample_rows(first: int, count: int, length: int, seed: int) -> np.ndarray:
    """The rows that samples `first`.. `first + count` of a training run are: each epoch a permutation of its own.

    A pure function of its arguments: the order needs no state to be resumed, and batches run on over the epochs' ends.
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
