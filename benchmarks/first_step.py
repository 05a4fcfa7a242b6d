"""Seconds from the start of a process to the end of its first training step, at demo size.

    python -m benchmarks.first_step [--runs runs/demo] [--rounds 3] [--json]

Each round runs stage `d2s` of the demo in two processes: `cold` compiles all programs, `cached`
reads them from `JAX_COMPILATION_CACHE_DIR`. `--runs` is the workdir of `make demo`, which has the
teacher and the dense student.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds_to_first_step(runs: Path, workdir: Path, cache: Path) -> float:
    """Starts the stage, kills it when it has reported its first step, and returns the seconds."""
    command = [sys.executable, "-m", "moddistill.train", "--config", "experiments/d2s.py:demo"]
    command += [f"--config.student={runs}/d2d/model", f"--config.teacher={runs}/teacher/model"]
    command += ["--config.log_every=1", "--workdir", str(workdir)]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    rows = workdir / "metrics.jsonl"
    began = time.perf_counter()
    with (workdir.parent / "stderr.txt").open("w+") as stderr:
        process = subprocess.Popen(command, env=env, stderr=stderr)
        try:
            while not (rows.is_file() and rows.stat().st_size):
                if process.poll() is not None:
                    stderr.seek(0)
                    raise RuntimeError(f"the stage ended before its first step:\n{stderr.read()}")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def measure(runs: Path, rounds: int) -> dict[str, float]:
    """Returns median seconds with an empty and with a filled compilation cache."""
    seconds: dict[str, list[float]] = {"cold": [], "cached": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind, times in seconds.items():
                workdir = Path(folder) / kind
                times.append(seconds_to_first_step(runs, workdir, Path(folder) / "cache"))
    return {kind: statistics.median(times) for kind, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.runs, args.rounds)
    if args.json:
        print(json.dumps(result))
        return
    for kind, seconds in result.items():
        print(f"{kind:>8} {seconds:6.1f} s")


if __name__ == "__main__":
    main()
