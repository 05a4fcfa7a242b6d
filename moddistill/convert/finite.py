"""Check for NaN and infinite weights: counted while tensors are copied, one error at the end."""

import collections

import numpy as np

from moddistill.errors import UserError

_MOST_LINES = 20
_BLOCK = 2**17  # numbers, which fit into the CPU cache
# Bit masks of the exponent; NaN and infinity are the numbers with all bits of it set.
_EXPONENTS = {
    "float64": 0x7FF0000000000000,
    "float32": 0x7F800000,
    "bfloat16": 0x7F80,
    "float16": 0x7C00,
}


class FiniteCheck:
    """Counts non-finite numbers per tensor."""

    def __init__(self, origin: str):
        self.origin = origin
        self.counts: dict[str, collections.Counter[str]] = {}

    def add(self, name: str, array: np.ndarray) -> None:
        """Counts the non-finite numbers in one block of the tensor `name`."""
        if is_finite(array):
            return
        counts = self.counts.setdefault(name, collections.Counter())
        counts["NaN"] += int(np.sum(np.isnan(array)))
        counts["infinite"] += int(np.sum(np.isinf(array)))

    def close(self) -> None:
        """Raises one UserError that lists all tensors with non-finite numbers, if any."""
        if not self.counts:
            return
        lines = [
            f"{name}: {', '.join(f'{n:,} {kind}' for kind, n in counts.items() if n)}"
            for name, counts in self.counts.items()
        ]
        more = len(lines) - _MOST_LINES
        lines = lines[:_MOST_LINES] + ([f"and {more} more"] if more > 0 else [])
        raise UserError(
            f"{self.origin}: expected finite weights, got non-finite numbers in "
            f"{len(self.counts)} tensors:\n  " + "\n  ".join(lines)
        )


def is_finite(array: np.ndarray) -> bool:
    """Returns True if no number is NaN or infinite; compares bits, as `isfinite` is slow."""
    mask = _EXPONENTS.get(array.dtype.name)
    if mask is None:
        return True
    bits = np.ravel(array, order="K").view(f"u{array.dtype.itemsize}")
    mask = bits.dtype.type(mask)
    blocks = (bits[i : i + _BLOCK] for i in range(0, len(bits), _BLOCK))
    return all(np.max(block & mask) < mask for block in blocks)
