"""Which ids of a vocabulary are tokens, as half-open ranges.

An embedding has more rows than its tokenizer has tokens, and `<image>` has an id that no model may
produce, anywhere among the others. Losses and decoding mask every id outside these ranges.
"""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_MASKED = -1e30

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


def masked_logits(
    hidden: Float[Array, "*T D"], head: Float[Array, "V D"], real_ids: IdRanges
) -> Float[Array, "*T V"]:
    """float32 logits; those outside `real_ids` are -1e30, so that their probability is 0.

    The value is finite because of KL terms `p * log p`: 0 * -1e30 is 0, while 0 * -inf is NaN.
    """
    logits = jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)
    return jnp.where(token_mask(real_ids, logits.shape[-1]), logits, _MASKED)
