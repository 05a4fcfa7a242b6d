"""Packing: which samples share a row, as a function of lengths, seed and row number only.

The samples of a window of the order are packed by best fit: the longest first, each into the row
with the least space that suffices. Rows of a window are shuffled, since the first have the longest
samples. Without packing each sample has a row.
"""

import bisect
import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from moddistill.data.order import Order, Window, permute
from moddistill.errors import invalid

_MOST_SAMPLES = 10**9  # of all epochs; planning takes a few milliseconds for each 1,024
_WINDOWS = 8  # that are cached, for threads which read neighbouring rows


class Sample(NamedTuple):
    """One sample of a row: number of its source, of its record in it, and its length in tokens."""

    source: int
    record: int
    length: int


Row = tuple[Sample, ...]


@runtime_checkable
class Plan(Protocol):
    """Rows by their numbers, the same in every process."""

    def row(self, number: int) -> Row:
        """Returns the samples of a row."""


class RowPlan:
    """The rows of an endless run; row n is the same in every process.

    Args:
      lengths: from a window to the lengths of its samples, at most `capacity`.
      capacity: tokens of a row.
      packs: whether a row may have several samples.
    """

    def __init__(
        self, order: Order, lengths: Callable[[Window], np.ndarray], capacity: int, packs: bool
    ):
        self.order = order
        self._lengths = lengths
        self._capacity = capacity
        self._packs = packs
        self._starts = [0]  # the first row of each window that has been planned, and one more
        self._lock = threading.Lock()
        self._window = functools.lru_cache(_WINDOWS)(self._plan)

    def __reduce__(self):
        # Rows that are planned already need not be planned again in a worker.
        state = (self.order, self._lengths, self._capacity, self._packs)
        return _restore, (state, self._starts)

    def row(self, number: int) -> Row:
        """Returns the samples of a row."""
        while self._starts[-1] <= number:
            self._plan_next()
        window = bisect.bisect_right(self._starts, number) - 1
        return self._window(window)[number - self._starts[window]]

    def rows_of(self, epochs: int | float) -> int:
        """Returns the number of rows of some epochs, at least 1; the last may be a part of one.

        Raises:
          UserError: all their windows, which have to be planned, are too many.
        """
        samples = math.ceil(epochs * float(sum(self.order.uses)))
        if samples > _MOST_SAMPLES:
            expected = f"at most {_MOST_SAMPLES:,} samples in all, not {samples:,}, or config.steps"
            raise invalid("config.epochs", epochs, expected)
        windows = epochs * self.order.windows_per_epoch
        whole = math.floor(windows)
        while len(self._starts) <= whole + 1:
            self._plan_next()
        begin, end = self._starts[whole : whole + 2]
        return max(1, begin + round((windows - whole) * (end - begin)))

    def _plan_next(self) -> None:
        with self._lock:
            count = len(self._window(len(self._starts) - 1))
            self._starts.append(self._starts[-1] + count)

    def _plan(self, number: int) -> list[Row]:
        window = self.order.window(number)
        lengths = self._lengths(window)
        groups = range(len(lengths))
        bins = best_fit(lengths, self._capacity) if self._packs else [[i] for i in groups]
        samples = [
            Sample(*each) for each in zip(*(x.tolist() for x in (*window, lengths)), strict=True)
        ]
        order = permute(np.arange(len(bins), dtype=np.uint64), len(bins), (self.order.seed, number))
        return [tuple(samples[i] for i in bins[j]) for j in order]


def _restore(state: tuple, starts: list[int]) -> RowPlan:
    plan = RowPlan(*state)
    plan._starts = list(starts)
    return plan


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Returns groups of indices whose lengths add up to `capacity` at most, few and full.

    Best fit decreasing: it needs at most 11/9 of the fewest groups possible, plus a constant.
    """
    groups: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # free tokens and number of each group, sorted
    lengths = np.asarray(lengths)
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect.bisect_left(spaces, (length, -1))
        if at < len(spaces):
            space, group = spaces.pop(at)
        else:
            space, group = capacity, len(groups)
            groups.append([])
        groups[group].append(index)
        bisect.insort(spaces, (space - length, group))
    return groups
