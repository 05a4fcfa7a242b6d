"""`kill -9` at random moments, each followed by the same command."""

import random
import time

import pytest

from tests.soak import runs

pytestmark = pytest.mark.soak
KILLS = 20
FLAGS = ["--config.steps=400", "--config.save_every=2", "--config.log_every=1"]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_runs_end_as_undisturbed_ones(workers, tmp_path):
    """Parameters, metrics and records are the same, bit for bit, and no process lives on."""
    flags = [*FLAGS, f"--config.data.workers={workers}"]
    runs.finish(tmp_path / "whole" / "run", *flags)
    moments, run = random.Random(workers), tmp_path / "killed" / "run"
    steps = []
    for _ in range(KILLS):
        process = runs.start(run, *flags)
        time.sleep(moments.uniform(1, 16))
        assert process.poll() is None, runs.printed_by(run).read_text()
        assert runs.kill(process) == []
        steps.append(len(runs.rows(run)))
    print(f"{workers} workers: {KILLS} kills, at steps {steps}")
    assert len(set(steps)) > KILLS // 4  # in steps, not only while starting
    runs.finish(run, *flags)
    assert runs.same(run, tmp_path / "whole" / "run")
