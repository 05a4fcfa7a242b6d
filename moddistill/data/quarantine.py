"""Quarantine: JSONL files that list the records left out of training, each with its reason."""

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

# The reader threads of a process share one Quarantine object, and with it `_known`.
_LOCK = threading.Lock()


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

    Worker processes may share the file: lines of other processes are read before any is appended.
    """

    def __init__(self, path: str):
        self.path = path
        self._known: set[tuple[str, int]] = set()

    def add(self, rejected: Sequence[Rejected]) -> None:
        """Appends those of `rejected` that the file does not contain yet."""
        with _LOCK:
            if all((item.file, item.line) in self._known for item in rejected):
                return
            self._known = self._read()
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            # O_APPEND and one `write` a line: lines of several processes do not interleave.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                for item in rejected:
                    if (item.file, item.line) not in self._known:
                        line = json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n"
                        os.write(descriptor, line.encode(errors="backslashreplace"))
                        self._known.add((item.file, item.line))
            finally:
                os.close(descriptor)

    @property
    def count(self) -> int:
        """Number of distinct records in the file, written by any process."""
        return len(self._read())

    def _read(self) -> set[tuple[str, int]]:
        if not os.path.exists(self.path):
            return set()
        # The last line may still be incomplete in another process: it counts once it ends.
        lines = Path(self.path).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        return {(item["file"], item["line"]) for item in map(json.loads, lines)}
