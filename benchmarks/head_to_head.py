"""Head-to-head benchmark: implementations of the same work, each in its own process.

A benchmark module defines `SIDES`, from a name to a function that prepares the work in a folder and
returns the function to time. An optional `make_files(folder)` first writes the files that the sides
read. Machines are noisy, so the sides alternate and medians are compared. The timed function
returns figures of its result. In every round all sides that report a figure must agree on it.

Peak memory is the resident memory of the process in the timed runs. It excludes the preparation of
weights and inputs and the warm-up run, which compiles. Working memory is the peak beyond what was
resident when weights and inputs were ready.
"""

import argparse
import ctypes
import gc
import importlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 2**20
_AGREE = 1e-5  # largest relative difference that rounding explains


def serve(module: str, side: str, folder: str) -> None:
    """Runs one side in its process: one run per input line; prints the peak memory at the end."""
    run = importlib.import_module(module).SIDES[side](Path(folder))
    give_back()
    ready = resident_bytes("VmRSS")
    run()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        figures = run()
        print(json.dumps([time.perf_counter() - began, figures]), flush=True)
    print(resident_bytes("VmHWM"), ready)


def give_back() -> None:
    """Returns memory freed after loading and compiling to the system; Linux with glibc only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes(kind: str) -> int:
    """Returns the resident bytes of this process, now (`VmRSS`) or at most (`VmHWM`); Linux only.

    `ru_maxrss` does not work here: a child starts with the peak of its parent.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{kind}:\s+(\d+) kB$", status, re.MULTILINE)[1])


def compare(module: str, rounds: int) -> dict[str, Any]:
    """Returns median seconds and peak bytes of every side, after one warm-up run each."""
    with tempfile.TemporaryDirectory() as folder:
        return _compare(module, rounds, Path(folder))


def _compare(module: str, rounds: int, folder: Path) -> dict[str, Any]:
    benchmark = importlib.import_module(module)
    if hasattr(benchmark, "make_files"):
        benchmark.make_files(folder)
    children = {side: _start(module, side, folder) for side in benchmark.SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in children}
    for _ in range(rounds):
        figures = {}
        for side, child in children.items():
            child.stdin.write("run\n")
            child.stdin.flush()
            taken, figures[side] = json.loads(child.stdout.readline())
            seconds[side].append(taken)
        check_agreement(figures)
    result = {}
    for side, child in children.items():
        with child:
            rest, _ = child.communicate()
        peak, ready = map(int, rest.split())
        result[side] = {
            "seconds": statistics.median(seconds[side]),
            "fastest": min(seconds[side]),
            "peak_bytes": peak,
            "working_bytes": peak - ready,
        }
    return result


def check_agreement(figures: dict[str, dict[str, float]]) -> None:
    """Raises RuntimeError unless all sides that report a figure agree on it."""
    for name in sorted(set().union(*figures.values())):
        values = {side: found[name] for side, found in figures.items() if name in found}
        first = next(iter(values.values()))
        if not all(abs(value - first) <= _AGREE * abs(first) for value in values.values()):
            raise RuntimeError(f"sides disagree on {name}: {values}")


def _start(module: str, side: str, folder: Path) -> subprocess.Popen:
    """Starts a side and waits for its warm-up run, so that warm-up runs do not overlap."""
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.head_to_head", module, side, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if child.stdout.readline() != "ready\n":
        raise RuntimeError(f"{module}: {side} did not start")
    return child


def main(module: str, description: str) -> None:
    """Entry point of a benchmark: `python -m benchmarks.NAME [--rounds N] [--json]`."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = compare(module, args.rounds)
    if args.json:
        print(json.dumps(result))
        return
    for side, figures in result.items():
        print(
            f"{side:>12} {1000 * figures['seconds']:10.1f} ms"
            f" {figures['peak_bytes'] / MIB:10.0f} MiB peak,"
            f" {figures['working_bytes'] / MIB:8.0f} MiB working memory"
        )


if __name__ == "__main__":
    serve(*sys.argv[1:])
