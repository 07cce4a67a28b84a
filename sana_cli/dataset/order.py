"""Permutations of [0, n) that are computed, not kept: each place is worked out alone, whatever n is.

It knows no dataset. A hundred million images would need 0.8 GB for a list of their order.

A Feistel network on two digits, high and low, of a number below `a * b`: one round adds a hash of the one digit to
the other, and they change places. That is a permutation of [0, a b), whatever the hash. Where it leads to a number of
n or more, it is applied again until it does not, which makes a permutation of [0, n) (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002).
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ROUNDS = 16  # even, so that the digits end where they began; with 8, orders of five images are not yet equally likely


@dataclass(frozen=True)
class Shuffle:
    """A permutation of [0, length) drawn by a key: equal keys give equal permutations on every machine."""

    length: int
    key: tuple[int, ...]

    def __post_init__(self) -> None:
        assert 0 < self.length <= 2**62, self.length

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at these places (n,), each in [0, length)."""
        return self._walk(places, backwards=False)

    def places(self, values: np.ndarray) -> np.ndarray:
        """Where these values (n,) stand: the inverse."""
        return self._walk(values, backwards=True)

    def _walk(self, numbers: np.ndarray, backwards: bool) -> np.ndarray:
        found = self._rounds(numbers.astype(np.uint64), backwards)
        while (outside := found >= self.length).any():
            found[outside] = self._rounds(found[outside], backwards)
        return found.astype(np.int64)

    def _rounds(self, numbers: np.ndarray, backwards: bool) -> np.ndarray:
        high, low = numbers // self._radix, numbers % self._radix
        for number in reversed(range(ROUNDS)) if backwards else range(ROUNDS):
            if number % 2 == 0:
                high = _added(high, _hash(low, self._keys[number]), self._radices[0], backwards)
            else:
                low = _added(low, _hash(high, self._keys[number]), self._radices[1], backwards)
        return high * self._radix + low

    @cached_property
    def _radices(self) -> tuple[np.uint64, np.uint64]:
        """How many values the high and the low digit have: as few as give every number a place."""
        low = math.isqrt(self.length - 1) + 1
        return np.uint64(-(-self.length // low)), np.uint64(low)

    @property
    def _radix(self) -> np.uint64:
        return self._radices[1]

    @cached_property
    def _keys(self) -> list[np.uint64]:
        """One for each round."""
        digest = hashlib.shake_256(f"sana order {self.length} {self.key}".encode()).digest(8 * ROUNDS)
        return [np.uint64(int.from_bytes(digest[8 * at : 8 * at + 8], "little")) for at in range(ROUNDS)]


def _added(digits: np.ndarray, hashes: np.ndarray, radix: np.uint64, backwards: bool) -> np.ndarray:
    """Digits plus hashes, or minus, modulo their radix."""
    change = hashes % radix
    return (digits + (radix - change if backwards else change)) % radix


def _hash(digits: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 bits of each digit and a key: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    mixed = (digits + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
