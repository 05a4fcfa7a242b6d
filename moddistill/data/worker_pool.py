"""Pools of processes that end with the process that started them.

Processes are spawned, since threads of a forked one may hold locks.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any

from moddistill.errors import UserError


@contextlib.contextmanager
def worker_pool(
    workers: int, start: Callable[..., None] | None = None, *args: Any
) -> Iterator[ProcessPoolExecutor]:
    """Yields a pool of processes.

    Args:
      start: called in each process, with `args`.

    Raises:
      UserError: a process was killed, or did not start.
    """
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(start, args),
    )
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "expected worker processes that end by themselves, got one that was killed (out of "
            "memory?), or that could not start (a script without `if __name__ == '__main__':`?)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(start: Callable[..., None] | None, args: Sequence[Any]) -> None:
    end_with_parent()
    if start is not None:
        start(*args)


def end_with_parent() -> None:
    """Ends a worker whose parent was killed; by itself, it would wait for work forever.

    Signals that a terminal or a scheduler sends to all processes are for the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sentinel = multiprocessing.parent_process().sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
