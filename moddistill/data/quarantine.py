"""Quarantine: JSONL files that list the records left out of training, each with its reason."""

import dataclasses
import fcntl
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable

from moddistill.errors import printable
from moddistill.storage.text_file import write_all, writing

_LONGEST_REASON = 500  # characters


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """A record that is left out, and the reason.

    `line` is 1-based, as in `records.Record`.
    """

    file: str
    line: int
    reason: str


class Quarantine:
    """A JSONL file of rejected records, each (file, line) once, across processes and runs.

    Processes may share the file: each reads what others have appended before it appends.

    Attributes:
      counts: number of listed records of each file, as of the last `add`.
    """

    def __init__(self, path: str):
        self.path = path
        self.counts: Counter[str] = Counter()
        self._known: set[tuple[str, int]] = set()
        self._read_to = 0  # bytes
        self._is_cut = False  # the last line has no end
        self._lock = threading.Lock()

    def add(self, rejected: Iterable[Rejected]) -> None:
        """Appends those of `rejected` that the file does not contain yet."""
        new = {(item.file, item.line): item for item in rejected}
        with self._lock:
            self._read_new()
            if new.keys() <= self._known:
                return
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            with writing(self.path), open(self.path, "ab", buffering=0) as file:
                # Without the lock, a line that another process is writing looks like one that an
                # interruption has cut, which is ended here.
                fcntl.flock(file, fcntl.LOCK_EX)
                self._read_new()
                lines = [_line(item) for key, item in new.items() if key not in self._known]
                write_all(file, b"\n" * self._is_cut + b"".join(lines))
                self._read_new()

    @property
    def count(self) -> int:
        """Number of distinct records in the file, written by any process."""
        with self._lock:
            self._read_new()
            return len(self._known)

    def _read_new(self) -> None:
        """Reads the lines that were appended since the last time."""
        if not os.path.exists(self.path):
            return
        with open(self.path, "rb") as file:
            file.seek(self._read_to)
            *lines, rest = file.read().split(b"\n")
        self._is_cut = bool(rest)
        for line in lines:
            self._read_to += len(line) + 1
            if (key := _key(line)) is not None:
                self.counts[key[0]] += key not in self._known
                self._known.add(key)


def _key(line: bytes) -> tuple[str, int] | None:
    """Returns file and number of a listed record; None for a line that was cut or damaged."""
    try:
        match json.loads(line):
            case {"file": str(file), "line": int(number)}:
                return file, number
    except (ValueError, RecursionError):
        pass
    return None


def _line(item: Rejected) -> bytes:
    reason = item.reason
    if len(reason) > _LONGEST_REASON:
        reason = reason[: _LONGEST_REASON - 3] + "..."
    fields = dataclasses.asdict(dataclasses.replace(item, reason=reason))
    return (printable(json.dumps(fields, ensure_ascii=False)) + "\n").encode()
