"""SIGTERM, by which schedulers end a process: a run saves after its step, and exits."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from moddistill.errors import StoppedError

LOG = logging.getLogger("moddistill")


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
    with _watched_signals() as received:
        yield lambda _: received.is_set()


@contextlib.contextmanager
def _watched_signals() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM sets; the second one ends the process.

    Handlers in Python wait until the main thread returns from XLA, which may compile for minutes,
    and two signals count as one by then. The numbers of signals reach a thread at once.
    """
    received, (reader, writer) = threading.Event(), os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):  # nothing once the other end is closed
            if number[0] != signal.SIGTERM:
                continue
            if received.is_set():
                os._exit(StoppedError.exit_code)
            received.set()
            LOG.warning("SIGTERM: stops after this step; a second one ends the process at once")
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGTERM, before)
        os.close(writer)
