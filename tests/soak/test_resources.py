"""Memory, descriptors and threads of a long run."""

import statistics
from pathlib import Path

import pytest

from tests.soak import runs

pytestmark = pytest.mark.soak
FLAGS = ["--config.steps=2200", "--config.save_every=20", "--config.log_every=1"]


def measure(pid):
    """Resident memory in MiB, open descriptors and threads of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().split("\n")[:-1]
    )
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(status["VmRSS"].split()[0]) / 1024, descriptors, int(status["Threads"])


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_descriptors_and_threads_stay_flat(workers, tmp_path):
    """Over 2,000 steps and 100 checkpoints, of which each has descriptors for a moment."""
    run = tmp_path / "run"
    process = runs.start(run, *FLAGS, f"--config.data.workers={workers}", stage="sft")
    found = {}
    for after in range(200, 2200, 25):
        runs.wait_for(lambda after=after: len(runs.rows(run)) >= after, 300)
        found[after] = measure(process.pid)
    runs.kill(process)
    first = [value for step, value in found.items() if step < 600]
    last = [value for step, value in found.items() if step >= 1800]
    # Medians, since a checkpoint that is being written has descriptors and threads of its own.
    medians = [[statistics.median(x) for x in zip(*part, strict=True)] for part in (first, last)]
    print(f"{workers} workers: MiB, descriptors, threads {medians[0]} and then {medians[1]}")
    early, late = medians
    assert late[0] <= early[0] + 16
    assert late[1] <= early[1] and late[2] <= early[2] + 1
