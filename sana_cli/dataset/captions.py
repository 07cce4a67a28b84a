"""Ids of captions, found by their hash: memory does not grow with the captions. It knows no file of a dataset.

A caption is known by 128 bits of its BLAKE2b hash. Among a billion captions, the probability that any two share one
is below 1e-20, so the texts are neither kept nor compared.

The hashes lie in sorted runs. New captions are a run of their own, and runs of like size are merged, so that there
are few, each at least twice as large as the next (O'Neil et al., "The log-structured merge-tree", 1996). All but
small runs are unnamed files, 24 bytes a caption, which end with the process. An SQLite table needs less code, but
rewrites a page for each new hash: at four million captions it was ten times slower.

Shapes: n captions or hashes.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

SMALL = 2**16  # captions of a run that is kept in memory, and about as many of what is merged at once
HIGH, LOW, ID = range(3)  # rows of a run (3, n), sorted by HIGH: halves of the hashes, and the ids


class CaptionIds:
    """Numbers captions in the order in which they come."""

    def __init__(self, folder: Path) -> None:
        """`folder` has room for the files."""
        self._folder = folder
        self._runs: list[np.ndarray] = []  # the largest first
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def number(self, captions: Sequence[str]) -> tuple[dict[str, int], list[str]]:
        """The id of each of these distinct captions, and those of them that are new, in order."""
        hashes = _hashes(captions)
        ids = self._find(hashes)
        new = np.flatnonzero(ids < 0)
        ids[new] = self._count + np.arange(len(new))
        self._count += len(new)
        if len(new):
            self._add(hashes[:, new], ids[new])
        return dict(zip(captions, ids.tolist(), strict=True)), [captions[at] for at in new.tolist()]

    def close(self) -> None:
        """Give the files back."""
        self._runs.clear()

    def _find(self, hashes: np.ndarray) -> np.ndarray:
        """The ids (n,) of hashes (2, n); -1 for those that are new."""
        order = np.argsort(hashes[HIGH])  # neighbours are looked up on one page of the file
        high, low = hashes[:, order]
        found = np.full(len(order), -1, dtype=np.int64)
        for run in self._runs:
            at, end = (np.searchsorted(run[HIGH], high, side=side) for side in ("left", "right"))
            while len(left := np.flatnonzero(at < end)):
                alike = left[run[LOW, at[left]] == low[left]]
                found[alike] = run[ID, at[alike]]
                at[left] += 1  # another hash with this first half: rare, but it must not hide one
        ids = np.empty_like(found)
        ids[order] = found
        return ids

    def _add(self, hashes: np.ndarray, ids: np.ndarray) -> None:
        run = np.stack([*hashes, ids.astype(np.uint64)])[:, np.argsort(hashes[HIGH])]
        while self._runs and self._runs[-1].shape[1] < 2 * run.shape[1]:
            run = self._merged(self._runs.pop(), run)
        self._runs.append(run)

    def _merged(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Both runs as one. Hashes are uniform, so equal ranges of them are parts of about equal size."""
        count = one.shape[1] + other.shape[1]
        merged = self._empty(count)
        parts = count // SMALL + 1
        edges = np.arange(1, parts, dtype=np.uint64) * np.uint64((2**64 - 1) // parts)
        cuts = [[0, *np.searchsorted(run[HIGH], edges).tolist(), run.shape[1]] for run in (one, other)]
        for (a, b), (c, d) in zip(*map(pairwise, cuts), strict=True):
            part = np.concatenate([one[:, a:b], other[:, c:d]], axis=1)
            order = np.argsort(part[HIGH], kind="stable")  # linear: both are sorted
            merged[:, a + c : b + d] = part[:, order]
        return merged

    def _empty(self, count: int) -> np.ndarray:
        if count <= SMALL:
            return np.empty((3, count), dtype=np.uint64)
        with tempfile.TemporaryFile(prefix=".tmp", dir=self._folder) as file:  # stays until it is unmapped
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and would be a signal below
                os.posix_fallocate(file.fileno(), 0, 3 * 8 * count)
            return np.memmap(file, dtype=np.uint64, mode="w+", shape=(3, count))


def _hashes(captions: Sequence[str]) -> np.ndarray:
    """The halves of their hashes, (2, n)."""
    digests = (
        hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        for caption in captions
    )
    return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2).T
