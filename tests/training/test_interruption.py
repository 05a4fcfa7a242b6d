"""Runs that are ended by signals, in processes of their own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from moddistill.training.metrics import read_metrics

RUN = [sys.executable, "-m", "moddistill.train", "--config", "experiments/sft.py:tiny"]
FLAGS = ["--config.steps=100000", "--config.save_every=50000", "--config.log_every=1"]


@pytest.fixture
def start(tmp_path):
    """Starts a run of one device, and waits for its first rows of metrics."""
    processes = []

    def start(*flags):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        command = [*RUN, "--workdir", str(tmp_path / "run"), *FLAGS, *flags]
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        processes.append(run)
        wait_for(lambda: run.poll() is not None or len(rows(tmp_path)) >= 3)
        assert run.poll() is None, run.stderr.read()
        return run

    yield start
    for run in processes:
        run.kill()
        run.communicate()


def rows(tmp_path):
    return read_metrics(tmp_path / "run" / "metrics.jsonl")


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def children(pid):
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def alive(pids):
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_the_step_and_exits(workers, start, tmp_path):
    run = start(f"--config.data.workers={workers}")
    workers = children(run.pid)
    run.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, printed = run.communicate(timeout=30)
    assert time.monotonic() - began < 30
    assert run.returncode == 143
    assert "Traceback" not in printed and "stops after this step" in printed
    [saved] = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert rows(tmp_path)[-1]["step"] == saved
    wait_for(lambda: not alive(workers), seconds=5)
    again = start()
    assert len([row for row in rows(tmp_path) if row["step"] == saved]) == 1
    again.kill()


@pytest.mark.slow
def test_ctrl_c_saves_the_step_and_exits(start, tmp_path):
    run = start()
    run.send_signal(signal.SIGINT)
    _, printed = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "Traceback" not in printed and "SIGINT: stops after this step" in printed
    [saved] = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert rows(tmp_path)[-1]["step"] == saved


@pytest.mark.slow
def test_sigterm_ends_the_wait_for_a_worker_that_is_stopped(start, tmp_path):
    run = start("--config.data.workers=1")
    [worker] = [pid for pid in children(run.pid) if b"spawn_main" in command_line(pid)]
    os.kill(worker, signal.SIGSTOP)
    time.sleep(2)  # until all rows are used that are there
    run.send_signal(signal.SIGTERM)
    _, printed = run.communicate(timeout=20)
    assert run.returncode == 143 and "while waiting for records" in printed
    [saved] = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert rows(tmp_path)[-1]["step"] == saved
    wait_for(lambda: not alive([worker]), seconds=5)


@pytest.mark.slow
def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path):
    command = [*RUN, "--workdir", str(tmp_path / "run"), "--config.steps=2"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stderr=full, timeout=90)
    assert done.returncode == 0
    assert [row["step"] for row in rows(tmp_path)][-1] == 2


@pytest.mark.slow
def test_second_sigterm_ends_the_run_at_once(start, tmp_path):
    run = start("--config.data.workers=1")
    workers = children(run.pid)
    for _ in range(2):
        run.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    run.wait(timeout=10)
    assert run.returncode in (143, -signal.SIGTERM)
    wait_for(lambda: not alive(workers), seconds=5)


def test_second_sigterm_ends_a_process_that_is_in_a_call_of_c():
    """As XLA compiles; a handler in Python would wait for its end."""
    code = (
        "import hashlib\n"
        "from moddistill.training.interruption import until_signal\n"
        "with until_signal():\n"
        "    print(flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'a', b'b', 2**31 - 1)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    run.stdout.readline()
    for _ in range(2):
        time.sleep(0.3)
        run.send_signal(signal.SIGTERM)
    assert run.wait(10) == 143
    run.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("stops", [False, True])
def test_no_worker_outlives_a_killed_run(start, stops):
    """Nor one that is stopped, whose own threads do not run."""
    run = start("--config.data.workers=2")
    workers = children(run.pid)
    assert len(workers) >= 2
    if stops:
        spawned = [pid for pid in workers if b"spawn_main" in command_line(pid)]
        os.kill(spawned[0], signal.SIGSTOP)
    run.kill()
    wait_for(lambda: not alive(workers), seconds=5)


@pytest.mark.slow
def test_second_run_in_a_workdir_is_refused(start, tmp_path):
    run = start()
    command = [*RUN, "--workdir", str(tmp_path / "run"), *FLAGS]
    other = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert other.returncode == 1 and f"in which process {run.pid} runs" in other.stderr
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=30)
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_worker_that_stops_or_ends_is_named(sent, start):
    run = start("--config.data.workers=2", "--config.data.worker_timeout=5")
    workers = [pid for pid in children(run.pid) if b"spawn_main" in command_line(pid)]
    os.kill(workers[0], sent)
    _, printed = run.communicate(timeout=40)
    assert run.returncode == 1 and "Traceback" not in printed
    expected = {
        signal.SIGSTOP: f"config.data.worker_timeout: .* processes .*{workers[0]} (stopped)",
        signal.SIGKILL: f"config.data.workers: .* ended one: {workers[0]} (SIGKILL)",
    }[sent]
    assert all(part in printed for part in expected.split(".*")), printed
    wait_for(lambda: not alive(workers), seconds=5)


def command_line(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()
