"""Two real processes as one run, with the collectives that CPUs have."""

import os
import socket
import subprocess
import sys
import time

import pytest

from moddistill.metrics import read_metrics
from moddistill.processes import join

pytestmark = pytest.mark.slow
PATIENCE = 400  # seconds; two processes share the machine with whatever else runs


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """`start(workdir, ...)`: runs of the smallest d2s stage; none outlives its test."""
    running = []

    def make(workdir, *extra, devices, processes=1):
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
        command = [sys.executable, "-m", "moddistill.train", "--config", "experiments/d2s.py:tiny"]
        command += ["--workdir", str(workdir), "--config.remat=none", *extra]
        joined = ["--coordinator", f"localhost:{free_port()}", "--processes", str(processes)]
        started = []
        for index in range(processes):
            whole = command + (joined + ["--process", str(index)] if processes > 1 else [])
            with said(tmp_path, len(running)).open("w") as errors:
                started.append(subprocess.Popen(whole, env=env, stderr=errors))
            running.append(started[-1])
        return started

    def finish(*args, **kwargs):
        for run in make(*args, **kwargs):
            assert run.wait(PATIENCE) == 0, said(tmp_path, running.index(run)).read_text()

    make.finish = finish
    yield make
    for run in running:
        run.kill()
        run.wait()


def said(folder, index):
    """What the run of this number wrote to its standard error."""
    return folder / f"stderr-{index}.txt"


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir / "metrics.jsonl")]


def test_two_processes_are_one_run(tmp_path, start):
    start.finish(tmp_path / "one", devices=8)
    start.finish(tmp_path / "two", devices=4, processes=2)
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    written = {path.name for path in (tmp_path / "two" / "model").iterdir()}
    assert written == {path.name for path in (tmp_path / "one" / "model").iterdir()}


def test_a_process_that_dies_ends_the_other_and_the_run_resumes(tmp_path, start):
    run = tmp_path / "run"
    first, second = start(run, "--config.steps=30", devices=4, processes=2)
    until = time.monotonic() + PATIENCE
    while len(losses(run)) < 5:
        assert time.monotonic() < until
        assert first.poll() is None, said(tmp_path, 0).read_text()
        time.sleep(0.2)
    second.kill()
    assert first.wait(240) != 0
    assert not (run / "model").exists()
    done = len(losses(run))
    start.finish(run, "--config.steps=30", devices=4, processes=2)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 31))
    assert done < 30


def test_index_outside_of_the_processes():
    with pytest.raises(ValueError, match="--process is 2 of --processes 2; accepted: 0 to"):
        join("localhost:1", 2, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("localhost:1", None, None), "--coordinator localhost:1"),
        (("localhost:1", 2, None), "--coordinator localhost:1 --processes 2"),
        (("localhost:1", None, 0), "--coordinator localhost:1 --process 0"),
        (("", 2, 1), "--processes 2 --process 1"),
        (("", None, 0), "--process 0"),
        (("auto", 2, 1), "--coordinator auto --processes 2 --process 1"),
    ],
)
def test_flags_that_would_leave_a_process_alone(given, said):
    with pytest.raises(ValueError, match=f"^flags are {said}; accepted: --coordinator HOST"):
        join(*given)


def test_a_process_alone():
    join("", None, None)
