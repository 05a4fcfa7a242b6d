"""Bounds of numbers."""

import dataclasses
import operator
from collections.abc import Iterator

MAX_FLOAT32 = 3.4028235e38


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, named like the functions of `operator`; always finite in float32.

    >>> str(Range(gt=0, le=1))
    '> 0 and <= 1'
    """

    ge: int | float | None = None
    gt: int | float | None = None
    le: int | float | None = None
    lt: int | float | None = None

    def __contains__(self, value: int | float) -> bool:
        return abs(value) <= MAX_FLOAT32 and all(
            getattr(operator, name)(value, bound) for name, bound in self._bounds()
        )

    def __str__(self) -> str:
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        return " and ".join(f"{signs[name]} {bound}" for name, bound in self._bounds())

    def _bounds(self) -> Iterator[tuple[str, int | float]]:
        return ((name, bound) for name, bound in vars(self).items() if bound is not None)
