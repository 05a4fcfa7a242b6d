"""CPU time and memory of a process and its children, for benchmarks; Linux only."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Returns the result of a function that runs in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def running() -> list[int]:
    """Returns the ids of this process and of its children."""
    lists = Path("/proc/self/task").glob("*/children")
    return [os.getpid(), *(int(pid) for each in lists for pid in each.read_text().split())]


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of all its children, also those that ended."""
    ticks = 0
    for pid in running():
        with contextlib.suppress(OSError):  # it has ended
            # Fields 14 to 17, counted from 1: user and system time, and those of ended children.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def private_bytes() -> int:
    """Returns the resident bytes of this process and its children without pages of files."""
    pages = 0
    for pid in running():
        with contextlib.suppress(OSError):
            _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
            pages += int(resident) - int(shared)
    return pages * os.sysconf("SC_PAGESIZE")


@contextlib.contextmanager
def sampled(function: Callable[[], int]) -> Iterator[list[int]]:
    """Yields a list to which a thread appends results of a function, four times a second."""
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.25):
            samples.append(function())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
