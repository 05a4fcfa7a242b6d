"""Kinds of reasons for which records are rejected."""

import re
from typing import Any

from moddistill.data.quarantine import Rejected

_EXPECTED = re.compile(r"expected .*?(?=, got |$)", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w-])\d+([,.]\d+)*")
_NAME = re.compile(r"'[^']*'|\"[^\"]*\"")


class Reasons:
    """Counts rejected records by what was expected, with the first example of each."""

    def __init__(self):
        self._kinds: dict[str, dict[str, Any]] = {}

    def add(self, rejected: Rejected) -> None:
        """Counts a record."""
        example = f"{rejected.file}, record {rejected.line}: {rejected.reason}"
        found = self._kinds.setdefault(kind(rejected.reason), {"count": 0, "example": example})
        found["count"] += 1

    def commonest(self, most: int) -> dict[str, dict[str, Any]]:
        """Returns `count` and `example` of the commonest kinds."""
        ordered = sorted(self._kinds.items(), key=lambda item: -item[1]["count"])
        return dict(ordered[:most])


def kind(reason: str) -> str:
    """Returns what a reason expects, without numbers and names.

    >>> kind("number of <image>: expected 2, one per image, got 1")
    'expected N, one per image'
    """
    match = _EXPECTED.search(reason)
    text = match[0] if match else reason
    return _NUMBER.sub("N", _NAME.sub("...", text))
