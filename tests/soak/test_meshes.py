"""A run that goes on with other devices, processes and workers after each kill."""

import socket

import pytest

from moddistill.training.metrics import read_metrics
from tests.soak import runs

pytestmark = pytest.mark.soak
FLAGS = ["--config.steps=40", "--config.save_every=2", "--config.log_every=1"]
WIDE = ["--config.mesh.data=-1", "--config.mesh.expert=4"]
RECORDS = ("samples", "padding", "supervised")  # of a step


def start(run, devices, processes, workers):
    """Starts the processes of a run."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        coordinator = f"localhost:{listener.getsockname()[1]}"
    flags = [*FLAGS, *WIDE, f"--config.data.workers={workers}"]
    if processes == 1:
        return [runs.start(run, *flags, devices=devices)]
    flags += ["--coordinator", coordinator, "--processes", str(processes), "--process"]
    # Each with a standard error of its own.
    return [
        runs.start(
            run, *flags, str(index), devices=devices, errors=run.with_name(f"{index}.stderr")
        )
        for index in range(processes)
    ]


def test_records_and_losses_do_not_depend_on_the_machine(tmp_path):
    """8 devices, 4 devices, 2 processes of 4 devices; 0, 2 and 1 workers."""
    whole, run = tmp_path / "whole" / "run", tmp_path / "run"
    assert [process.wait(600) for process in start(whole, 8, 1, 0)] == [0]
    for devices, processes, workers, until in ((8, 1, 0, 10), (4, 1, 2, 22), (4, 2, 1, 40)):
        started = start(run, devices, processes, workers)
        if until == 40:
            assert [process.wait(600) for process in started] == [0, 0]
            continue
        runs.wait_for(lambda until=until: len(runs.rows(run)) >= until, 300)
        assert len(runs.rows(run)) < 40
        assert [runs.kill(process) for process in started] == [[]]
    found, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run, whole))
    assert [row["step"] for row in found] == list(range(1, 41))
    for name in RECORDS:
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected])
    losses = [[row["loss"] for row in rows] for rows in (found, expected)]
    print("largest difference of a loss:", max(abs(a - b) for a, b in zip(*losses, strict=True)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5, rel=0)
