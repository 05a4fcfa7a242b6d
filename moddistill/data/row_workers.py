"""Rows from worker processes: row n comes from worker n % N, through a pipe of its own.

Only the worker has the other end of its pipe open. So one that ends is noticed at once, also in the
middle of a row, and nothing ever waits for it; a queue that several processes share would.
"""

import contextlib
import itertools
import math
import pickle
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from moddistill.data.worker_process import WorkerContext
from moddistill.errors import UserError

_ENDED = None  # in place of a row
_START = 60  # seconds that workers may take besides, to start
_STATES = {"T": "stopped", "D": "waiting for a disk", "Z": "ended", "R": "running", "S": "waiting"}


class RowWorkers:
    """Iterator over `make(0)`, `make(1)`, ..., which processes call.

    Args:
      make: sent to each process.
      ahead: rows that are made ahead.
      timeout: seconds without a row after which a worker counts as stopped.

    Raises:
      UserError: while iterating, if a worker ends, or makes no row for `timeout` seconds.
    """

    def __init__(self, make: Callable[[int], Any], workers: int, ahead: int, timeout: int):
        queue = math.ceil(ahead / workers)
        self._workers = [_Worker(make, first, workers, queue) for first in range(workers)]
        self._turns = itertools.cycle(self._workers)
        self._timeout = timeout
        self._patience = timeout + _START  # for the next row
        # They ignore the signal by which Python would end them at its exit.
        self._close = weakref.finalize(self, _close, self._workers)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        worker = next(self._turns)
        try:
            item = worker.made.get(timeout=self._patience)
        except Empty:
            raise self._stopped() from None
        if item is _ENDED:
            raise self._ended(worker)
        row, error = item
        if error is not None:
            raise error
        self._patience = self._timeout
        return row

    def close(self) -> None:
        """Ends the workers."""
        self._close()

    def _stopped(self) -> UserError:
        pids = [worker.process.pid for worker in self._workers]
        shown = ", ".join(f"{pid} ({_state(pid)})" for pid in pids)
        self.close()
        return UserError(
            f"config.data.worker_timeout: expected a row within {self._timeout} seconds, got "
            f"none from the processes {shown}"
        )

    def _ended(self, worker: "_Worker") -> UserError:
        worker.process.join()
        cause = _cause(worker.process.exitcode)
        self.close()
        return UserError(
            "config.data.workers: expected processes that live as long as the run, got an ended "
            f"one: {worker.process.pid} ({cause}); out of memory?"
        )


class _Worker:
    """A process, and the rows that it has made and that are not taken yet."""

    def __init__(self, make: Callable[[int], Any], first: int, step: int, queue: int):
        context = WorkerContext()
        receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_make, args=(make, first, step, sender), daemon=True)
        self.process.start()
        sender.close()
        self.made: Queue[Any] = Queue(queue)
        self.thread = threading.Thread(target=_receive, args=(receiver, self.made), daemon=True)
        self.thread.start()


def _make(make: Callable[[int], Any], first: int, step: int, sender: Connection) -> None:
    """Sends every `step`-th row, or an error, with which a worker ends."""
    for number in itertools.count(first, step):
        row, error = None, None
        try:
            row = make(number)
        except Exception as raised:
            raised.add_note("".join(traceback.format_exception(raised)))
            error = raised
        sender.send_bytes(pickle.dumps((row, error), pickle.HIGHEST_PROTOCOL))
        if error is not None:
            return


def _receive(receiver: Connection, made: "Queue[Any]") -> None:
    """Moves rows from a pipe to a queue, until the worker ends."""
    with receiver:
        item: Any = True
        while item is not _ENDED:
            try:
                item = pickle.loads(receiver.recv_bytes())
            except (EOFError, OSError):
                item = _ENDED
            except Exception as error:  # one that cannot be unpickled, in the place of its row
                item = None, error
            made.put(item)


def _close(workers: Sequence[_Worker]) -> None:
    """Ends processes, stopped ones too, and the threads that wait for their rows."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        while worker.thread.is_alive():  # until it has room for its last row
            with contextlib.suppress(Empty):
                worker.made.get(timeout=0.01)


def _cause(exit_code: int | None) -> str:
    ended = exit_code is not None and exit_code < 0
    return signal.Signals(-exit_code).name if ended else f"exit code {exit_code}"


def _state(pid: int) -> str:
    """Returns what a process does, as far as the system tells."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "unknown"
    return _STATES.get(letter, letter)
