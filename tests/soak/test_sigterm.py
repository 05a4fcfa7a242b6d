"""SIGTERM during a long step."""

import signal
import time

import pytest

from tests.soak import runs

pytestmark = pytest.mark.soak
# Steps of about two seconds on one core.
FLAGS = ["--config.steps=1000", "--config.save_every=1000", "--config.log_every=1"]
FLAGS += ["--config.batch_size=128", "--config.grad_accum_steps=2"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_step_in_progress_is_saved(workers, tmp_path):
    run = tmp_path / "run"
    process = runs.start(run, *FLAGS, f"--config.data.workers={workers}")
    runs.wait_for(lambda: len(runs.rows(run)) >= 3 or process.poll() is not None, 300)
    assert process.poll() is None, runs.printed_by(run).read_text()
    done, began, family = len(runs.rows(run)), time.monotonic(), runs.descendants(process.pid)
    runs.wait_for(lambda: len(runs.rows(run)) > done, 60)
    step = time.monotonic() - began
    time.sleep(0.5)  # inside the next step
    done, sent = len(runs.rows(run)), time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    seconds = time.monotonic() - sent
    [saved] = [int(path.name) for path in (run / "checkpoints").iterdir()]
    print(
        f"{workers} workers, steps of {step:.1f} s: saved step {saved} after {done} were done, "
        f"exit in {seconds:.1f} s"
    )
    assert saved in (done, done + 1) and runs.rows(run)[-1]["step"] == saved
    runs.wait_for(lambda: not runs.alive(family), 5)
