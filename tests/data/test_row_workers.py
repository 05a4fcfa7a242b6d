"""Rows from worker processes; `tests/training/test_interruption.py` has those of whole runs."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from moddistill.data.row_workers import RowWorkers
from moddistill.errors import UserError


def large(number):
    """A row that fills a pipe several times."""
    return np.full(2**20, number, np.uint8)


def broken(number):
    if number == 3:
        raise UserError("row 3 is bad")
    return number


def slow(number):
    time.sleep(1000 * (number > 1))
    return number


@pytest.fixture
def start():
    started = []

    def start(make, workers, timeout=60):
        started.append(RowWorkers(make, workers, 4, timeout))
        return started[-1]

    yield start
    for rows in started:
        rows.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_come_in_order(start, workers):
    rows = start(large, workers)
    assert [int(next(rows)[0]) for _ in range(7)] == list(range(7))


def test_closing_ends_processes_and_threads_at_once(start):
    threads = threading.active_count()
    rows = start(large, 2)
    next(rows)
    time.sleep(1)  # until their pipes are full, in the middle of a row
    processes = [worker.process for worker in rows._workers]
    os.kill(processes[0].pid, signal.SIGSTOP)
    began = time.monotonic()
    rows.close()
    assert time.monotonic() - began < 5
    assert not any(process.is_alive() for process in processes)
    assert threading.active_count() == threads


def test_dropping_the_rows_ends_the_processes():
    rows = RowWorkers(large, 1, 4, 60)
    process = rows._workers[0].process
    del rows
    assert not process.is_alive()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_in_the_place_of_its_row(start, workers):
    rows = start(broken, workers)
    assert [next(rows) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="row 3 is bad") as error:
        next(rows)
    assert "in broken" in error.value.__notes__[0]  # where in the worker


def test_an_ended_worker_is_named_in_the_middle_of_a_row(start):
    rows = start(large, 2)
    next(rows)
    time.sleep(1)
    pid = rows._workers[1].process.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(UserError, match=rf"an ended one: {pid} \(SIGKILL\)"):
        for _ in range(20):
            next(rows)


def test_workers_without_a_row_in_time_are_named(start):
    rows = start(slow, 2, timeout=1)
    assert [next(rows), next(rows)] == [0, 1]
    began = time.monotonic()
    with pytest.raises(UserError, match=r"a row within 1 seconds, .* \d+ \(waiting\), \d+ \(wait"):
        next(rows)
    assert time.monotonic() - began < 5
