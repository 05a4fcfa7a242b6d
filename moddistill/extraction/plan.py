"""Which records share a row: those of one shard of a cache, in the order of the shards."""

import bisect
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moddistill.data.packing import Row, Sample, best_fit
from moddistill.data.sources import Source
from moddistill.teachers.cache import SHARD_RECORDS, shard_names

_CACHED = 8  # shards, for threads which read neighbouring rows


class Shard(NamedTuple):
    """A shard to be made: its source, and its usable records there, `first` to `end`.

    Attributes:
      name: of its file.
      positions: of these records within the shard, whose other entries have no targets.
      size: number of entries.
    """

    source: int
    name: str
    first: int
    end: int
    positions: np.ndarray
    size: int


def shards_of(source: Source, number: int, name: str) -> list[Shard]:
    """Returns all shards of a source, which has a number and a name."""
    positions = source.positions(np.arange(len(source)))
    starts = np.arange(0, source.total, SHARD_RECORDS)
    ends = np.minimum(starts + SHARD_RECORDS, source.total)
    bounds = np.searchsorted(positions, [starts, ends])
    return [
        Shard(number, file, first, end, positions[first:end] - start, stop - start)
        for file, start, stop, first, end in zip(
            shard_names(name, source.total),
            starts.tolist(),
            ends.tolist(),
            *bounds.tolist(),
            strict=True,
        )
    ]


class ShardPlan:
    """The rows of some shards, one shard after the other; a row after the last one is empty.

    Args:
      capacity: tokens of a row.
      packs: whether a row may have several samples.
    """

    def __init__(
        self, sources: Sequence[Source], shards: Sequence[Shard], capacity: int, packs: bool
    ):
        self.sources, self.shards = sources, shards
        self.capacity, self.packs = capacity, packs
        self._rows = functools.lru_cache(_CACHED)(self._plan)
        self.starts = [0]  # the first row of each shard, and one more
        for number in range(len(shards)):
            self.starts.append(self.starts[-1] + len(self._rows(number)))

    def __reduce__(self):
        return ShardPlan, (self.sources, self.shards, self.capacity, self.packs)

    def row(self, number: int) -> Row:
        """Returns the samples of a row."""
        if number >= self.starts[-1]:
            return ()
        shard = self.shard_of(number)
        return self._rows(shard)[number - self.starts[shard]]

    def shard_of(self, row: int) -> int:
        """Returns which of the shards a row belongs to."""
        return bisect.bisect_right(self.starts, row) - 1

    def _plan(self, number: int) -> list[Row]:
        shard = self.shards[number]
        records = np.arange(shard.first, shard.end)
        lengths = self.sources[shard.source].lengths(records)
        groups = (
            best_fit(lengths, self.capacity) if self.packs else [[i] for i in range(len(lengths))]
        )
        return [
            tuple(Sample(shard.source, shard.first + i, int(lengths[i])) for i in group)
            for group in groups
        ]
