"""Pools of worker processes."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from moddistill.data.worker_process import WorkerContext
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
    pool = ProcessPoolExecutor(workers, WorkerContext(), start, args)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "expected worker processes that end by themselves, got one that was killed (out of "
            "memory?), or that could not start"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
