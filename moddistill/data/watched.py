"""Rows from worker processes that are watched: one that stops or ends is noticed, and named."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from moddistill.errors import UserError

_NAME = "grain-process-prefetch"  # begins the names of grain's workers
_LOOK_EVERY = 0.5  # seconds
_START = 60  # seconds that workers may take besides, to start
_STATES = {"T": "stopped", "D": "waiting for a disk", "Z": "ended", "R": "running", "S": "waiting"}


class WatchedRows:
    """Iterator over rows that grain's worker processes make.

    Args:
      timeout: seconds without a row after which the workers count as stopped.

    Raises:
      UserError: while iterating, if a worker ends, or none makes a row for `timeout` seconds.
    """

    def __init__(self, rows: Iterator[Any], timeout: int):
        self._rows, self._timeout = rows, timeout
        self._workers: dict[int, Any] = {}
        self._first = True
        self._asked: SimpleQueue[bool] = SimpleQueue()
        self._found: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        # A daemon, since `next` never returns from a worker that has stopped.
        threading.Thread(target=self._serve, daemon=True).start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._asked.put(True)
        deadline = time.monotonic() + self._timeout + (_START if self._first else 0)
        while True:
            try:
                row, error = self._found.get(timeout=_LOOK_EVERY)
                break
            except Empty:
                self._check_workers(deadline)
        if error is not None:
            self._check_workers(deadline)  # an error of grain's, if a worker was killed
            raise error
        self._first = False
        return row

    def close(self) -> None:
        """Stops the workers."""
        self._asked.put(False)
        self._rows.close()

    def _serve(self) -> None:
        while self._asked.get():
            try:
                self._found.put((next(self._rows), None))
            except BaseException as error:
                self._found.put((None, error))

    def _check_workers(self, deadline: float) -> None:
        """Raises UserError if a worker has ended, or after the deadline."""
        children = multiprocessing.active_children()
        self._workers |= {each.pid: each for each in children if each.name.startswith(_NAME)}
        ended = {pid: each.exitcode for pid, each in self._workers.items() if each.exitcode}
        if ended:
            self._kill()
            shown = ", ".join(f"{pid} ({_cause(code)})" for pid, code in ended.items())
            raise UserError(
                "config.data.workers: expected processes that live as long as the run, got ended "
                f"ones: {shown}; out of memory, or a script without `if __name__ == '__main__':`?"
            )
        if time.monotonic() > deadline:
            shown = ", ".join(f"{pid} ({_state(pid)})" for pid in self._workers)
            self._kill()
            raise UserError(
                f"config.data.worker_timeout: expected a row within {self._timeout} seconds, got "
                f"none from the processes {shown}"
            )

    def _kill(self) -> None:
        """Ends all workers, stopped ones too, for which this process would wait at its exit."""
        for worker in self._workers.values():
            worker.kill()


def _cause(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def _state(pid: int) -> str:
    """Returns what a process does, as far as the system tells."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "unknown"
    return _STATES.get(letter, letter)
