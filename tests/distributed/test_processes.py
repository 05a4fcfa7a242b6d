"""Two real processes as one run, with the collectives that CPUs have."""

import os
import socket
import subprocess
import sys
import time

import jax
import pytest

from moddistill.distributed.processes import initialize
from moddistill.training.metrics import read_metrics

pytestmark = pytest.mark.slow
PATIENCE = 400  # seconds; two processes share the machine with whatever else runs


def free_port(port=0):
    """A port that nobody listens on: this one, or any; None if this one is taken."""
    with socket.socket() as listener:
        try:
            listener.bind(("localhost", port))
        except OSError:
            return None
        return listener.getsockname()[1]


def by_flags(processes):
    """Arguments and environment of each process that is told everything by flags."""
    flags = ["--coordinator", f"localhost:{free_port()}", "--processes", str(processes)]
    return [([*flags, "--process", str(index)], {}) for index in range(processes)]


def by_slurm(processes):
    """As `srun` starts them, on one node; JAX makes the port of the job's number."""
    job = next(job for job in range(os.getpid(), 2**30) if free_port(61440 + job % 4096))
    env = {"JOB_ID": job, "STEP_NODELIST": "localhost", "NTASKS": processes}
    places = [{"PROCID": index, "LOCALID": index} for index in range(processes)]
    return [
        (["--coordinator", "auto"], {f"SLURM_{k}": str(v) for k, v in (env | place).items()})
        for place in places
    ]


@pytest.fixture
def start(tmp_path):
    """`start(workdir, ...)`: runs of the smallest d2s stage; none outlives its test."""
    running = []

    def make(workdir, *extra, devices, told=(([], {}),)):
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        env["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
        command = [sys.executable, "-m", "moddistill.train", "--config", "experiments/d2s.py:tiny"]
        command += ["--workdir", str(workdir), "--config.remat=none", *extra]
        started = []
        for flags, more in told:
            with said(tmp_path, len(running)).open("w") as errors:
                started.append(subprocess.Popen(command + flags, env=env | more, stderr=errors))
            running.append(started[-1])
        return started

    def finish(*args, **kwargs):
        """Runs to the end; what each process wrote to its standard error."""
        started = make(*args, **kwargs)
        texts = [said(tmp_path, running.index(run)) for run in started]
        for run, text in zip(started, texts, strict=True):
            assert run.wait(PATIENCE) == 0, text.read_text()
        return [text.read_text() for text in texts]

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
    """Experts and kernels are sharded over both, an eighth on a device; only the first one logs.

    The one process has the collectives of several, which add up in their own order.
    """
    wide = [f"--config.{x}" for x in ("mesh.data=1", "mesh.expert=8", "moe.num_experts=8")]
    [alone] = start.finish(tmp_path / "one", *wide, devices=8, told=by_flags(1))
    first, second = start.finish(tmp_path / "two", *wide, devices=4, told=by_flags(2))
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    written = {path.name for path in (tmp_path / "two" / "model").iterdir()}
    assert written == {path.name for path in (tmp_path / "one" / "model").iterdir()}
    for text in (alone, first):
        assert "experts are computed by a loop over pieces of one expert" in text
    assert "experts are computed by" not in second and "step" not in second


def test_a_process_that_dies_ends_the_other_and_the_run_resumes(tmp_path, start):
    """First the one that does not coordinate, then the one that does; told by Slurm."""
    run = tmp_path / "run"
    for victim, done in ((1, 5), (0, 8)):
        processes = start(run, "--config.steps=30", devices=4, told=by_slurm(2))
        survivor = processes[1 - victim]
        until = time.monotonic() + PATIENCE
        while len(losses(run)) < done:
            assert time.monotonic() < until
            assert all(process.poll() is None for process in processes), "see stderr-*.txt"
            time.sleep(0.2)
        processes[victim].kill()
        assert survivor.wait(240) != 0
        assert not (run / "model").exists()
        assert len(losses(run)) < 30
    start.finish(run, "--config.steps=30", devices=4, told=by_slurm(2))
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 31))


def test_processes_with_other_settings_do_not_begin(tmp_path, start):
    told = by_flags(2)
    told[1][0].append("--config.seed=5")
    for run in start(tmp_path / "run", devices=4, told=told):
        assert run.wait(PATIENCE) != 0
    message = "settings of process 1 are not those of process 0; accepted: the same command"
    assert any(message in said(tmp_path, index).read_text() for index in range(2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_one_of_several_tasks_that_would_be_alone(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    initialize("", None, None)
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=f"empty, but {name} is 4; accepted: --coordinator auto"):
        initialize("", None, None)


@pytest.mark.parametrize("coordinator", ["foo", "foo:bar", ":80", "AUTO"])
def test_coordinator_of_another_form(coordinator):
    with pytest.raises(ValueError, match=f"--coordinator is '{coordinator}'; accepted: HOST:PORT"):
        initialize(coordinator, 2, 0)


def test_nothing_that_tells_of_other_processes(monkeypatch):
    def undefined(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", undefined)
    with pytest.raises(ValueError, match=r"'auto', but nothing here.*defined\.\); accepted: auto"):
        initialize("auto", None, None)


def test_index_outside_of_the_processes():
    with pytest.raises(ValueError, match="--process is 2 of --processes 2; accepted: 0 to"):
        initialize("localhost:1", 2, 2)


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
        initialize(*given)


def test_a_process_alone():
    initialize("", None, None)
