"""SIGTERM, by which schedulers end a process, and Ctrl-C: a run saves after its step, and exits."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from moddistill.errors import StoppedError

LOG = logging.getLogger("moddistill")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Waiting(Exception):
    """A signal came while the run waited."""


class Stops:
    """Whether a run must stop. Without signals, it never does."""

    number = 0  # of the signal

    def after(self, step: int) -> bool:
        """Returns whether to stop after a step; every process asks once for each."""
        del step
        return bool(self.number)

    @contextlib.contextmanager
    def while_waiting(self) -> Iterator[None]:
        """Ends the block with `Waiting` when a signal comes, in a run of one process."""
        yield

    def error(self, text: str) -> StoppedError:
        """The error that ends the run, with the exit code of a process that the signal ended."""
        return StoppedError(text, 128 + (self.number or signal.SIGTERM))


class _OfProcesses(Stops):
    """The processes of a run all stop after the same step, whichever of them gets the signal."""

    def after(self, step: int) -> bool:
        # JAX has installed a handler of SIGTERM in each process, which agrees with the others.
        return multihost_utils.reached_preemption_sync_point(step)


class _OfProcess(Stops):
    """Set by the first signal; the second one ends the process."""

    _waits = False

    def handle(self, number: int, _: object) -> None:
        """The handler in Python, which runs when the main thread returns from XLA."""
        self.number = number
        if self._waits:
            raise Waiting

    @contextlib.contextmanager
    def while_waiting(self) -> Iterator[None]:
        self._waits = True
        try:
            if self.number:
                raise Waiting
            yield
        finally:
            self._waits = False


@contextlib.contextmanager
def until_signal() -> Iterator[Stops]:
    """Yields what tells whether a signal has come."""
    if jax.process_count() > 1:
        yield _OfProcesses()
    elif threading.current_thread() is not threading.main_thread():
        yield Stops()  # only the main thread may have handlers
    else:
        with _watched(_OfProcess()) as stops:
            yield stops


@contextlib.contextmanager
def _watched(stops: _OfProcess) -> Iterator[Stops]:
    """Handles signals; the second one ends the process at once.

    Handlers in Python wait until the main thread returns from XLA, which may compile for minutes,
    and two signals count as one by then. The numbers of signals reach a thread at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        first = 0
        while read := os.read(reader, 1):  # nothing once the other end is closed
            number = read[0]
            if number not in _SIGNALS:
                continue
            if first:
                os._exit(128 + number)
            first = stops.number = number
            name = signal.Signals(number).name
            LOG.warning("%s: stops after this step; a second one ends the process at once", name)
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    before = {number: signal.signal(number, stops.handle) for number in _SIGNALS}
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield stops
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
