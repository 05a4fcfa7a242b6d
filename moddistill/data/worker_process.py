"""Processes that work for a run and end with it.

They are spawned, since threads of a forked process may hold locks. Other than `multiprocessing`
does, they import nothing of the script or the command that started them: it may lack a guard
against being run again, and its imports cost each of them seconds and hundreds of MB.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any

_SPAWN = multiprocessing.get_context("spawn")
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class WorkerProcess(_SPAWN.Process):  # type: ignore[name-defined, misc]
    """A process that is killed when the thread that started it ends, which on Linux is at once.

    Signals that a terminal or a scheduler sends to all processes are for its parent.
    """

    def start(self) -> None:
        """Starts it; neither what is started nor its arguments may be of the main module."""
        resource_tracker.ensure_running()  # which unblocks signals, when it starts
        with _signals_blocked(), _without_main():
            super().start()

    def run(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()

    def __getstate__(self) -> tuple[int, bytes]:
        return os.getpid(), bytes(ForkingPickler.dumps(self.__dict__))

    def __setstate__(self, state: tuple[int, bytes]) -> None:
        parent, attributes = state
        _kill_with_parent(parent)  # before the imports of what it is to do
        self.__dict__.update(pickle.loads(attributes))


class WorkerContext(type(_SPAWN)):  # type: ignore[misc]
    """Context of `multiprocessing` with these processes, for an executor."""

    Process = WorkerProcess


def _kill_with_parent(parent: int) -> None:
    """Has the kernel kill this process with its parent, also while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _end_with_parent() -> None:
    """Ends this process with its parent, where the kernel does not; it might wait forever."""
    parent: Any = multiprocessing.parent_process()
    wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that start meanwhile never get the signals that are for their parent.

    They inherit the mask, and a scheduler may send a signal before `run` ignores it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start meanwhile find no main module that they could import."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
