"""Which ids of a vocabulary are tokens, as half-open ranges.

An embedding has more rows than its tokenizer has tokens, and `<image>` has an id that no model may
produce, anywhere among the others. Losses and decoding mask every id outside these ranges.
"""

from collections.abc import Iterable

import numpy as np

IdRanges = tuple[tuple[int, int], ...]


def id_ranges(ids: Iterable[int]) -> IdRanges:
    """Ranges `(first, last + 1)` of consecutive ids, in ascending order."""
    ordered = np.unique(np.fromiter(ids, np.int64))
    breaks = np.flatnonzero(np.diff(ordered) > 1) + 1
    parts = np.split(ordered, breaks) if len(ordered) else []
    return tuple((int(part[0]), int(part[-1]) + 1) for part in parts)


def common_ids(a: IdRanges, b: IdRanges) -> IdRanges:
    """The ids that are in the ranges of both."""
    overlaps = ((max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b)
    return tuple(sorted((start, stop) for start, stop in overlaps if start < stop))


def num_ids(ranges: IdRanges) -> int:
    """Number of ids in the ranges."""
    return sum(stop - start for start, stop in ranges)


def token_mask(ranges: IdRanges, rows: int) -> np.ndarray:
    """bool [V]: true for the ids among `rows` that are in the ranges."""
    mask = np.zeros(rows, bool)
    for start, stop in ranges:
        mask[start:stop] = True
    return mask
