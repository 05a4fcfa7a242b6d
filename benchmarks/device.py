"""Checks and benchmarks of this machine's accelerator, as a JSON file and a Markdown table.

    python -m benchmarks.device [--minutes 9] [--out runs/device.json]

1. Losses, attention, the expert layer and one step of every stage are compared with the CPU.
2. The sparse distillation step at the paper's size, large matmuls, the expert layer and decoding
   are timed, on the first device and with random weights.

Neither torch nor a network is needed. On a CPU all sizes are tiny, which tests the benchmark and
not the CPU.

The sections share `--minutes`. A section with too little time left is skipped; one that raises is
recorded, and the next one runs. Figures are written after each section, and the table is printed
at the end. The exit code is 1 if a check failed or a section raised, and 2 if a check did not run
for lack of time.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks import device_checks, device_steps, device_timings
from benchmarks.device_inputs import say

_VERSIONS = ("jax", "jaxlib", "flax", "optax", "libtpu")
_CUDA = ("jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")


class Section(NamedTuple):
    """A part of the benchmark.

    Attributes:
      share: fraction of the total time; the section is skipped if less than half of it is left.
      run: `(device, tiny, left)` to figures and rows of the `table`; `left()` returns the seconds
        until the section should end.
    """

    name: str
    share: float
    run: Callable[[Any, bool, Callable[[], float]], dict[str, Any]]


# Ordered by importance, since later sections may be skipped.
SECTIONS = (
    Section("operations", 0.15, device_checks.check_operations),
    Section("stages", 0.2, device_checks.check_stages),
    Section("d2s step", 0.2, device_steps.paper_step),
    Section("packed d2s step", 0.15, device_steps.packed_step),
    Section("ceilings", 0.03, device_timings.ceilings),
    Section("expert layer", 0.07, device_timings.expert_layer),
    Section("decoding", 0.1, device_timings.decoding),
    Section("second d2s step", 0.1, device_steps.second_step),
)


CHECKS = ("operations", "stages")


def run(seconds: float, out: Path) -> dict[str, Any]:
    """Runs all sections within about `seconds` and writes their figures to `out` after each."""
    [device, *_] = jax.devices()
    end = time.monotonic() + seconds
    report = {"device": describe_device(device), "seconds": seconds, "sections": {}}
    for number, section in enumerate(SECTIONS):
        left = end - time.monotonic()
        # Redistributes the time that earlier sections saved or overran.
        time_share = section.share / sum(other.share for other in SECTIONS[number:]) * left
        needed = section.share * seconds / 2
        if time_share < needed:
            reason = f"{max(time_share, 0):.0f} s are left for it, it needs {needed:.0f} s"
            entry = {"status": "skipped", "reason": reason}
        else:
            report["sections"][section.name] = {"status": "running"}  # stays if it is killed
            _write(report, out)
            entry = _run_section(section, device, time.monotonic() + time_share)
        say(f"{section.name}: {entry['status']} {entry.get('reason', '')}")
        report["sections"][section.name] = entry
        _write(report, out)
    return report


def _run_section(section: Section, device: Any, end: float) -> dict[str, Any]:
    """Runs a section; returns its figures, or the error that it raised."""
    began = time.monotonic()
    say(f"{section.name}: at most {end - began:.0f} s")
    try:
        figures = section.run(device, device.platform == "cpu", lambda: end - time.monotonic())
        entry = {"status": "measured"} | figures
    except Exception as error:  # the other sections must still run
        text = traceback.format_exc()
        say(text)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        entry = {"status": "raised", "reason": line, "traceback": text}
    jax.clear_caches()
    gc.collect()
    return entry | {"section_seconds": time.monotonic() - began}


def describe_device(device: Any) -> dict[str, Any]:
    """Returns the device, its runtime and the versions of the libraries that use it."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONS + _CUDA:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "runtime": device.client.platform_version,
        "memory_limit_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _write(report: dict[str, Any], out: Path) -> None:
    """Writes atomically, so that a killed run leaves the last complete file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".new")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(out)


def failed(report: dict[str, Any]) -> bool:
    """Returns whether a check failed or a section raised."""
    return any(entry["status"] in ("failed", "raised") for entry in report["sections"].values())


def incomplete(report: dict[str, Any]) -> bool:
    """Returns whether a check did not run for lack of time."""
    checks = (entry for name, entry in report["sections"].items() if name in CHECKS)
    return any(entry["status"] in ("incomplete", "skipped") for entry in checks)


def format_table(report: dict[str, Any]) -> str:
    """Returns a Markdown table for `docs/performance.md`: device, what, figure."""
    about = report["device"]
    device = f"{about['kind']}, jax {about['versions']['jax']}"
    lines = ["| device | what | figure |", "|---|---|---|"]
    for name, entry in report["sections"].items():
        rows = entry.get("table", [])
        if entry["status"] in ("skipped", "raised"):
            rows = [[name, f"{entry['status']}: {entry['reason']}"]]
        for cells in rows:
            text = " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
            lines.append(f"| {device} | {text} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m benchmarks.device`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all sections together")
    parser.add_argument("--out", type=Path, default=Path("runs/device.json"), help="JSON file")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes: expected > 0, got {args.minutes}")
    report = run(60 * args.minutes, args.out)
    print(format_table(report))
    if failed(report):
        return 1
    if incomplete(report):
        say("some checks did not run for lack of time; use more --minutes")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
