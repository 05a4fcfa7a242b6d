"""Runs of the smallest stages in processes of their own, which tests kill, watch and compare."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from moddistill.convert.resolve import load
from moddistill.params import flatten
from moddistill.training.metrics import read_metrics

COMPILED = Path(tempfile.gettempdir()) / "moddistill-soak-compiled"  # programs, for all runs
# Of the machine's speed, in a row of metrics.
_TIMES = ("seconds", "tokens_per_second", "student_tflops", "teacher_tflops")


TRAIN = ("moddistill.train",)


def start(
    workdir: Path,
    *flags: str,
    stage: str = "d2s",
    devices: int = 1,
    errors: Path | None = None,
    module: Sequence[str] = TRAIN,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen:
    """Starts the `:tiny` experiment of a stage; its standard error goes next to the workdir.

    Args:
      errors: another file for it.
      module: what Python runs, with its own arguments.
      variables: of the environment.
    """
    command = [sys.executable, "-m", *module, "--config", f"experiments/{stage}.py:tiny"]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    defaults = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    defaults["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
    with (errors or printed_by(workdir)).open("w") as stderr:
        command += ["--workdir", str(workdir), *flags]
        return subprocess.Popen(command, env=os.environ | defaults | dict(variables), stderr=stderr)


def printed_by(workdir: Path) -> Path:
    """The standard error of the last run in a workdir."""
    return workdir.with_name(f"{workdir.name}.stderr")


def finish(workdir: Path, *flags: str, **options: Any) -> str:
    """Runs to the end; returns what was printed."""
    code = start(workdir, *flags, **options).wait(600)
    printed = (options.get("errors") or printed_by(workdir)).read_text()
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


def params(workdir: Path) -> dict[str, np.ndarray]:
    """The parameters of the model that a run has written, by their paths."""
    _, loaded = load(workdir / "model")
    return {path: np.asarray(x) for path, x in flatten(loaded).items()}


def same(workdir: Path, other: Path) -> bool:
    """Whether two finished runs have the same metrics of every step and the same parameters."""
    found, expected = params(workdir), params(other)
    equal = [found[path].tobytes() == x.tobytes() for path, x in expected.items()]
    return found.keys() == expected.keys() and all(equal) and rows(workdir) == rows(other)
