"""Runs of two processes, with the collectives of the CPU backend."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from moddistill.distributed.processes import initialize, leaving_at_once
from moddistill.training.metrics import read_metrics

pytestmark = pytest.mark.slow
TIMEOUT = 400  # seconds; the machine may be shared


def free_port(port=0):
    """Returns a free port: `port`, or any for 0; None if it is in use."""
    with socket.socket() as listener:
        try:
            listener.bind(("localhost", port))
        except OSError:
            return None
        return listener.getsockname()[1]


def by_flags(processes):
    """Returns (arguments, environment) of each process, initialised by flags."""
    flags = ["--coordinator", f"localhost:{free_port()}", "--processes", str(processes)]
    return [([*flags, "--process", str(index)], {}) for index in range(processes)]


def by_slurm(processes):
    """Returns (arguments, environment) of each process as `srun` starts it, on one node.

    JAX derives the port from the job id.
    """
    job = next(job for job in range(os.getpid(), 2**30) if free_port(61440 + job % 4096))
    env = {"JOB_ID": job, "STEP_NODELIST": "localhost", "NTASKS": processes}
    ranks = [{"PROCID": index, "LOCALID": index} for index in range(processes)]
    return [
        (["--coordinator", "auto"], {f"SLURM_{k}": str(v) for k, v in (env | rank).items()})
        for rank in ranks
    ]


@pytest.fixture
def start(tmp_path):
    """Starts processes of the smallest d2s stage; kills those that are left after the test."""
    running = []

    def make(workdir, *extra, devices, launches=(([], {}),)):
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
        command = [sys.executable, "-m", "moddistill.train", "--config", "experiments/d2s.py:tiny"]
        command += ["--workdir", str(workdir), "--config.remat=none", *extra]
        started = []
        for flags, variables in launches:
            with stderr_file(tmp_path, len(running)).open("w") as errors:
                process = subprocess.Popen(command + flags, env=env | variables, stderr=errors)
            started.append(process)
            running.append(process)
        return started

    def finish(*args, **kwargs):
        """Runs to the end; returns the standard error of each process."""
        started = make(*args, **kwargs)
        texts = [stderr_file(tmp_path, running.index(run)) for run in started]
        for run, text in zip(started, texts, strict=True):
            assert run.wait(TIMEOUT) == 0, text.read_text()
        return [text.read_text() for text in texts]

    make.finish = finish
    yield make
    for run in running:
        run.kill()
        run.wait()


def stderr_file(folder, index):
    """Returns the file of the standard error of a process."""
    return folder / f"stderr-{index}.txt"


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir / "metrics.jsonl")]


def test_two_processes_train_like_one(tmp_path, start):
    """Experts and kernels are sharded over both, an eighth per device; only process 0 logs.

    The single process is initialised as distributed too, for the same order of summation.
    """
    wide = [f"--config.{x}" for x in ("mesh.data=1", "mesh.expert=8", "moe.num_experts=8")]
    [single] = start.finish(tmp_path / "one", *wide, devices=8, launches=by_flags(1))
    first, second = start.finish(tmp_path / "two", *wide, devices=4, launches=by_flags(2))
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    written = {path.name for path in (tmp_path / "two" / "model").iterdir()}
    assert written == {path.name for path in (tmp_path / "one" / "model").iterdir()}
    for text in (single, first):
        assert "experts are computed by a loop over blocks of one expert" in text
    assert "experts are computed by" not in second and "step" not in second


def test_run_may_resume_with_other_processes_and_workers(tmp_path, start):
    """Without learning, the loss of a step depends on its records only."""
    fixed = ["--config.optim.lr=0", "--config.batch_size=4"]  # half of the records
    start.finish(tmp_path / "one", *fixed, "--config.steps=4", devices=4)
    for steps, processes, workers in ((2, 2, 2), (4, 4, 0)):
        more = [f"--config.steps={steps}", f"--config.data.workers={workers}"]
        start.finish(
            tmp_path / "run", *fixed, *more, devices=4 // processes, launches=by_flags(processes)
        )
    expected = losses(tmp_path / "one")
    assert max(expected) - min(expected) > 1e-3
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-6)


def test_death_of_a_process_ends_the_other_and_the_run_resumes(tmp_path, start):
    """Kills the worker, then the coordinator; initialised by Slurm."""
    run = tmp_path / "run"
    for victim, done in ((1, 5), (0, 8)):
        processes = start(run, "--config.steps=30", devices=4, launches=by_slurm(2))
        survivor = processes[1 - victim]
        until = time.monotonic() + TIMEOUT
        while len(losses(run)) < done:
            assert time.monotonic() < until
            assert all(process.poll() is None for process in processes), "see stderr-*.txt"
            time.sleep(0.2)
        processes[victim].kill()
        assert survivor.wait(240) != 0
        assert not (run / "model").exists()
        assert len(losses(run)) < 30
    start.finish(run, "--config.steps=30", devices=4, launches=by_slurm(2))
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 31))


@pytest.mark.parametrize(("code", "leaves"), [("error: x", True), (143, False)])
def test_a_process_of_several_does_not_wait_for_the_others_after_an_error(
    code, leaves, monkeypatch, capsys
):
    left = []
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("os._exit", left.append)
    with pytest.raises(SystemExit), leaving_at_once():
        sys.exit(code)
    assert left == [1] * leaves
    assert capsys.readouterr().err == "error: x\n" * leaves


def test_sigterm_of_one_process_saves_the_run_and_ends_all(tmp_path, start):
    run, steps = tmp_path / "run", ["--config.steps=100000", "--config.save_every=100000"]
    processes = start(run, *steps, "--config.log_every=1", devices=4, launches=by_flags(2))
    until = time.monotonic() + TIMEOUT
    while len(losses(run)) < 3:
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), "see stderr-*.txt"
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    assert [process.wait(30) for process in processes] == [143, 143]
    [saved] = [int(path.name) for path in (run / "checkpoints").iterdir()]
    assert len(losses(run)) == saved
    for index in range(2):
        assert "Traceback" not in stderr_file(tmp_path, index).read_text()


def test_processes_with_different_settings_do_not_start(tmp_path, start):
    launches = by_flags(2)
    launches[1][0].append("--config.seed=5")
    for run in start(tmp_path / "run", devices=4, launches=launches):
        assert run.wait(TIMEOUT) != 0
    message = (
        "settings: expected the same command in every process, got other settings in process 1"
    )
    assert any(message in stderr_file(tmp_path, index).read_text() for index in range(2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_one_of_several_tasks_without_a_coordinator_is_an_error(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    initialize("", None, None)
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=f"expected auto with {name}=4, or one task, got no coord"):
        initialize("", None, None)


@pytest.mark.parametrize("coordinator", ["foo", "foo:bar", ":80", "AUTO"])
def test_malformed_coordinator_is_an_error(coordinator):
    with pytest.raises(
        ValueError, match=f"--coordinator: expected HOST:PORT or auto, got '{coordinator}'"
    ):
        initialize(coordinator, 2, 0)


def test_auto_without_other_processes_is_an_error(monkeypatch):
    def undefined(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", undefined)
    with pytest.raises(ValueError, match=r"expected HOST:PORT, or auto .* 'auto', .*defined\.\)$"):
        initialize("auto", None, None)


def test_process_index_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="--process: expected 0 to 1 with --processes 2, got 2"):
        initialize("localhost:1", 2, 2)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("localhost:1", None, None), "--coordinator localhost:1"),
        (("localhost:1", 2, None), "--coordinator localhost:1 --processes 2"),
        (("localhost:1", None, 0), "--coordinator localhost:1 --process 0"),
        (("", 2, 1), "--processes 2 --process 1"),
        (("", None, 0), "--process 0"),
        (("auto", 2, 1), "--coordinator auto --processes 2 --process 1"),
    ],
)
def test_incomplete_flags_are_an_error(flags, text):
    with pytest.raises(ValueError, match=f"^flags: expected --coordinator HOST.*got {text}$"):
        initialize(*flags)


def test_single_process_needs_no_flags():
    initialize("", None, None)
