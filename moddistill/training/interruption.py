"""SIGTERM, by which schedulers end a process: a run saves after its step, and exits."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

LOG = logging.getLogger("moddistill")
_EXIT_CODE = 128 + signal.SIGTERM


@contextlib.contextmanager
def until_sigterm() -> Iterator[Callable[[int], bool]]:
    """Yields a function that returns whether a run must stop after a step, which it is given.

    The processes of a run all stop after the same step, whichever of them gets the signal. In a
    single process, a second signal ends it at once.
    """
    if jax.process_count() > 1:
        # JAX has installed a handler in each process, which agrees with the others on a step.
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda _: False  # only the main thread may have handlers
        return
    received = threading.Event()

    def handle(*_: Any) -> None:
        if received.is_set():
            os._exit(_EXIT_CODE)
        received.set()
        LOG.warning("SIGTERM: stops after this step; a second one ends the process at once")

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield lambda _: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
