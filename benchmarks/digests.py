"""Seconds to write and to verify the digests of a large folder, compared with reading it.

    python -m benchmarks.digests [--gb 14] [--json]

The folder has files of 2 GB, as Orbax writes them, and is created in the system's temporary folder.
`cold` runs start with an empty page cache, `warm` runs with as many pages cached as fit.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from moddistill.storage.digests import verify, write_digests

_FILE = 2 * 10**9  # bytes
_BLOCK = 64 * 2**20  # bytes


def make_folder(folder: Path, size: int) -> None:
    """Writes files of random bytes, `size` bytes in total; no two blocks are equal."""
    block = np.random.default_rng(0).integers(0, 2**64, _BLOCK // 8, np.uint64)
    for number, start in enumerate(range(0, size, _FILE)):
        left = min(_FILE, size - start)
        with (folder / f"array-{number}").open("wb") as file:
            while left:
                block += np.uint64(1)
                left -= file.write(block.view(np.uint8)[:left])
            os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Drops all files below a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    """Reads all files with as many threads as `verify`."""

    def read_file(path: Path) -> None:
        buffer = bytearray(2**18)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with ThreadPoolExecutor() as pool:
        list(pool.map(read_file, folder.iterdir()))


def seconds(work: Callable[[], None]) -> float:
    """Returns the seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(gigabytes: float) -> dict[str, float]:
    """Returns the seconds of each kind of access."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder, round(gigabytes * 10**9))
        forget(folder)
        result = {"read, cold": seconds(lambda: read(folder))}
        result["read, warm"] = seconds(lambda: read(folder))
        result["write digests"] = seconds(lambda: write_digests(folder, "benchmark"))
        result["verify, warm"] = seconds(lambda: verify(folder))
        forget(folder)
        result["verify, cold"] = seconds(lambda: verify(folder))
    return result


def main() -> None:
    """Entry point of `python -m benchmarks.digests`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digests", description=__doc__)
    parser.add_argument("--gb", type=float, default=14.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    result = measure(args.gb)
    if args.json:
        print(json.dumps({"gb": args.gb, "load": before, "seconds": result}))
        return
    print(f"{args.gb} GB, {os.cpu_count()} cores, load before {before:.1f}")
    for name, value in result.items():
        print(f"{name:>14} {value:7.1f} s {args.gb / value:6.2f} GB/s")


if __name__ == "__main__":
    main()
