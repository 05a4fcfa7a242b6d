"""A teacher cache of a million records: opening, memory, random reads.

    python -m benchmarks.teacher_cache [--records 1000000] [--tokens 4] [--ids 64]

The cache has random targets of Qwen's ids. It is read in a new process, as worker processes do.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.head_to_head import resident_bytes
from moddistill.data.array_records import writing_records
from moddistill.data.token_texts import TokenTexts
from moddistill.extraction.shards import entries_together
from moddistill.storage.digests import write_digests
from moddistill.storage.json_file import write_json
from moddistill.teachers.cache import (
    SETTINGS,
    SHARD_RECORDS,
    VOCABULARY,
    CacheSettings,
    Fingerprint,
    SourceIdentity,
    TeacherCache,
    TeacherIdentity,
    shard_names,
)
from moddistill.teachers.entries import Entry, EntryFormat, TokenTargets

_REAL_IDS = ((0, 151_646),)
_READS = 5000


def write(folder: Path, records: int, tokens: int, ids: int) -> None:
    """Writes a cache whose records all have the same size."""
    format = EntryFormat("top_k", ids, _REAL_IDS)
    rng = np.random.default_rng(0)
    shape = (tokens, ids)
    entries = [
        format.pack(
            Entry(
                TokenTargets(
                    -rng.exponential(size=tokens),
                    rng.integers(0, _REAL_IDS[-1][1], tokens),
                    rng.integers(0, _REAL_IDS[-1][1], shape),
                    -rng.exponential(size=shape),
                    -rng.exponential(size=tokens),
                ),
            )
        )
        for _ in range(SHARD_RECORDS)
    ]
    for number, name in enumerate(shard_names("records", records)):
        size = sum(map(len, entries)) / len(entries)
        with writing_records(folder / name, entries_together(size)) as append:
            for entry in entries[: records - number * SHARD_RECORDS]:
                append(entry)
    source = SourceIdentity(records, "", "", {})
    fingerprint = Fingerprint("conversation", {}, 1.0, {"records": source})
    teacher = TeacherIdentity("random", "", "", "chatml", {}, "")
    settings = CacheSettings(format, 0, teacher, fingerprint)
    texts = [f"token {id}".encode() for id in range(_REAL_IDS[-1][1])]
    TokenTexts(texts, {}, None).save(folder / VOCABULARY)
    write_json(folder / SETTINGS, dataclasses.asdict(settings))
    write_digests(folder, "extract")


def read(folder: Path) -> dict[str, Any]:
    """Opens a cache and reads entries of records in random order."""
    before, begun = resident_bytes("VmRSS"), time.perf_counter()
    cache = TeacherCache(folder)
    cache.entry("records", 0), cache.texts
    opening = time.perf_counter() - begun
    records = cache.settings.fingerprint.sources["records"].records
    times = []
    for number in np.random.default_rng(1).integers(0, records, _READS).tolist():
        begun = time.perf_counter()
        cache.entry("records", number)
        times.append(time.perf_counter() - begun)
    return {
        "opening_seconds": opening,
        "median_read_seconds": statistics.median(times),
        "mean_read_seconds": statistics.fmean(times),
        "resident_bytes": resident_bytes("VmRSS") - before,
    }


def main() -> None:
    """Prints the figures of one cache."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.teacher_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--records", type=int, default=10**6)
    parser.add_argument("--tokens", type=int, default=4, help="of a record")
    parser.add_argument("--ids", type=int, default=64, help="of a token")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(args.read)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.records, args.tokens, args.ids)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        command = [sys.executable, "-m", "benchmarks.teacher_cache", "--read", folder]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{args.records:,} records, {size / args.records / args.tokens:.1f} bytes a token")
    print(f"opening, its vocabulary and one read: {found['opening_seconds']:.3f} s")
    median, mean = (1e3 * found[f"{name}_read_seconds"] for name in ("median", "mean"))
    print(f"a random read: median {median:.3f} ms, mean {mean:.3f} ms, of {_READS:,}")
    print(f"memory of these: {found['resident_bytes'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
