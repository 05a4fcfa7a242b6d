"""Order of records: an endless, shuffled mixture of sources, in windows, without any state.

An epoch uses each record of source s `weight_s` times: n_s * weight_s positions of the endless
stream of its shuffled records. It is divided into M windows of about `WINDOW` records. Window j of
epoch e has of source s the positions

    floor((e + j / M) * n_s * weight_s)   up to   floor((e + (j + 1) / M) * n_s * weight_s),

so that every window has the proportions of the mixture, to one record, and none reaches beyond an
epoch. Position p of a source is element p mod n_s of the permutation p div n_s of its records.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

WINDOW = 1024  # records
_ROUNDS = 6


class Window(NamedTuple):
    """Consecutive elements of the order: numbers of their sources and of records in them."""

    source: np.ndarray
    record: np.ndarray


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of the records of some sources.

    Attributes:
      sizes: number of records of each source.
      weights: uses of each record in an epoch.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    @functools.cached_property
    def uses(self) -> tuple[Fraction, ...]:
        """Elements of each source in an epoch."""
        pairs = zip(self.sizes, self.weights, strict=True)
        return tuple(size * Fraction(weight) for size, weight in pairs)

    @functools.cached_property
    def windows_per_epoch(self) -> int:
        return max(1, math.ceil(sum(self.uses) / WINDOW))

    def window(self, number: int) -> Window:
        """Returns a window, as a function of its number and the seed only."""
        sources, records = [], []
        for source, uses in enumerate(self.uses):
            begin, end = (
                math.floor(Fraction(each, self.windows_per_epoch) * uses)
                for each in (number, number + 1)
            )
            records.append(self._records(source, np.arange(begin, end, dtype=np.uint64)))
            sources.append(np.full(end - begin, source))
        return Window(np.concatenate(sources), np.concatenate(records))

    def _records(self, source: int, positions: np.ndarray) -> np.ndarray:
        """Returns the records at some positions of the stream of a source."""
        size = self.sizes[source]
        epochs, elements = np.divmod(positions, np.uint64(size))
        records = np.zeros(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            at = epochs == epoch
            records[at] = permute(elements[at], size, (self.seed, source, epoch))
        return records


def permute(elements: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Returns the images of some elements under a pseudo-random permutation of `range(size)`.

    A Feistel network permutes the smallest range 4**h that contains `size`; elements that land
    outside of `size` are permuted again until they are inside (cycle walking).

    Args:
      elements: uint64.
      key: integers that choose the permutation.
    """
    half = np.uint64(max(1, math.ceil((size - 1).bit_length() / 2)))
    keys = [_hash(*key, round_) for round_ in range(_ROUNDS)]
    found = _feistel(elements, half, keys)
    while np.any(outside := found >= size):
        found[outside] = _feistel(found[outside], half, keys)
    return found.astype(np.int64)


def _feistel(elements: np.ndarray, half: np.uint64, keys: Sequence[int]) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = elements >> half, elements & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + np.uint64(key)) & mask)
    return left << half | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, which spreads each bit over all bits (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*numbers: int) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
