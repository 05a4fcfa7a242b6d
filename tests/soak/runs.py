"""Runs of the smallest stages in processes of their own, which tests kill, watch and compare."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moddistill.training.metrics import read_metrics

# Of the machine's speed, in a row of metrics.
_TIMES = ("seconds", "tokens_per_second", "student_tflops", "teacher_tflops")


def start(workdir: Path, *flags: str, stage: str = "d2s", devices: int = 1) -> subprocess.Popen:
    """Starts the `:tiny` experiment of a stage; its standard error goes beside the workdir."""
    command = [sys.executable, "-m", "moddistill.train", "--config", f"experiments/{stage}.py:tiny"]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    variables = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    variables["JAX_COMPILATION_CACHE_DIR"] = str(workdir.parent / "compiled")
    with printed_by(workdir).open("w") as stderr:
        command += ["--workdir", str(workdir), *flags]
        return subprocess.Popen(command, env=os.environ | variables, stderr=stderr)


def printed_by(workdir: Path) -> Path:
    """The standard error of the last run in a workdir."""
    return workdir.with_name(f"{workdir.name}.stderr")


def finish(workdir: Path, *flags: str, **options: Any) -> str:
    """Runs to the end; returns what was printed."""
    code = start(workdir, *flags, **options).wait(600)
    printed = printed_by(workdir).read_text()
    assert code == 0, printed
    return printed


def kill(run: subprocess.Popen) -> list[int]:
    """Kills a run as the kernel does; returns its children that are alive 5 seconds later."""
    family = descendants(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_for(lambda: not alive(family), 5, fails=False)
    return alive(family)


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that these have."""
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    found = [int(line) for line in listed.stdout.split()]
    return found + [each for child in found for each in descendants(child)]


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def wait_for(condition: Callable[[], bool], seconds: float, fails: bool = True) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and (time.monotonic() < deadline or fails):
        assert time.monotonic() < deadline, f"nothing happened in {seconds} seconds"
        time.sleep(0.02)


def rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of metrics, without what depends on the machine's speed."""
    found = read_metrics(workdir / "metrics.jsonl")
    return [{name: x for name, x in row.items() if name not in _TIMES} for row in found]


def model_bytes(workdir: Path) -> dict[str, str]:
    """Digests of the files of the model that a run has written, except its description."""
    digests = json.loads((workdir / "model" / "digests.json").read_text())["files"]
    return {name: digest for name, digest in digests.items() if "params" in name}
