"""SIGTERM, by which schedulers end a process, and Ctrl-C: a run saves after its step, and exits."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from moddistill.errors import StoppedError

LOG = logging.getLogger("moddistill")
T = TypeVar("T")
_PATIENCE = 0.1  # seconds after which a wait looks for a signal
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

    def check(self) -> None:
        """Raises Waiting if a signal has come, in a run of one process."""
        if self.number:
            raise Waiting

    def wait(self, make: Callable[[], T]) -> T:
        """Returns `make()`, which may take long; always called in the same thread.

        Raises:
          Waiting: a signal comes before, in a run of one process.
        """
        return make()

    def error(self, text: str) -> StoppedError:
        """The error that ends the run, with the exit code of a process that the signal ended."""
        return StoppedError(text, 128 + (self.number or signal.SIGTERM))


class _OfProcesses(Stops):
    """The processes of a run all stop after the same step, whichever of them gets the signal."""

    def after(self, step: int) -> bool:
        # JAX has installed a handler of SIGTERM in each process, which agrees with the others.
        return multihost_utils.reached_preemption_sync_point(step)


class _OfProcess(Stops):
    """Set by the first signal; the second one ends the process.

    What takes long is called in a thread of its own, since a handler that raised an error would do
    so anywhere. It lives as long as the run, since data workers end with the thread that starts
    them.
    """

    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._made: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while (make := self._asked.get()) is not None:
            try:
                self._made.put((make(), None))
            except BaseException as error:
                self._made.put((None, error))

    def wait(self, make: Callable[[], T]) -> T:
        self.check()
        self._asked.put(make)
        while not self.number:
            with contextlib.suppress(Empty):
                made, error = self._made.get(timeout=_PATIENCE)
                if error is not None:
                    raise error
                return made
        raise Waiting

    def close(self) -> None:
        """Ends the thread, when it has made what was asked for."""
        self._asked.put(None)


@contextlib.contextmanager
def until_signal() -> Iterator[Stops]:
    """Yields what tells whether a signal has come."""
    if jax.process_count() > 1:
        yield _OfProcesses()
    elif threading.current_thread() is not threading.main_thread():
        yield Stops()  # only the main thread may have handlers
    else:
        with contextlib.closing(_OfProcess()) as stops, _watched(stops):
            yield stops


@contextlib.contextmanager
def _watched(stops: Stops) -> Iterator[None]:
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
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


@contextlib.contextmanager
def ctrl_c_ends_at_once() -> Iterator[None]:
    """Ends the process by Ctrl-C as by other signals, before a run handles it.

    Callbacks of JAX swallow the exception that Python raises.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
