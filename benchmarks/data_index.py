"""Index of millions of records: time and memory to make it, to open it, and to read any record.

    python -m benchmarks.data_index [--records 5000000] [--distinct 200000] [--rounds 3] [--json]

Records are LLaVA's, with an image that is not read and English text (`benchmarks.data_texts`).

- `make`: the index of `distinct` records whose texts all differ, as JSONL and as a JSON list,
  tokenized with Qwen's tokenizer on all cores; medians of alternating rounds.
- `use`: `records` records of one JSONL file, opened, planned in packed rows and read in a process
  that finds the index there. They repeat 500 texts, which are tokenized once in each block of
  records, so that it is made in minutes; `make_large` is the memory of that, its speed means
  nothing.

`memory_mib` is resident memory, pages of mapped files included, beyond `base_mib`, that of the
process with all modules and the tokenizer loaded. `processes_mib` is the memory of all processes
that make an index, without shared pages. Files are not in the page cache when they are first read.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_texts import Conversations, qwen_tokenizer
from benchmarks.digests import forget
from benchmarks.head_to_head import MIB, give_back, resident_bytes
from benchmarks.processes import cpu_seconds, in_new_process, private_bytes, sampled
from moddistill.config import DataConfig, SourceConfig
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import PAD_COLOR
from moddistill.data.index import IndexSpec, open_index
from moddistill.data.pipeline import open_sources, plan_rows
from moddistill.data.rows import RowSpec

_REPEATED = 500  # texts of the large file
_READS = 1000
SPEC = RowSpec("conversation", "vicuna", 2048, 336, 576, ImageRules(pad_color=PAD_COLOR))


def write_records(path: Path, count: int, make: Callable[[], str]) -> None:
    """Writes records as JSONL or as a JSON list; `make` returns the JSON of a conversation."""
    start, between, end = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[", ",\n", "]")
    with path.open("w") as file:
        file.write(start)
        for number in range(count):
            place = f'"id": "{number:09d}", "image": "train2017/{number:012d}.jpg"'
            separator = between if number + 1 < count else end
            file.write(f'{{{place}, "conversations": {make()}}}{separator}')
        file.flush()
        os.fsync(file.fileno())


def distinct(folder: Path) -> Callable[[], str]:
    """Returns a source of conversations that differ."""
    conversations = Conversations(qwen_tokenizer(folder / "qwen"))
    return lambda: json.dumps(conversations.make())


def repeated(folder: Path) -> Callable[[], str]:
    """Returns a source of conversations of a few texts."""
    make, rng = distinct(folder), np.random.default_rng(0)
    texts = [make() for _ in range(_REPEATED)]

    def numbers() -> Iterator[int]:
        while True:
            yield from rng.integers(_REPEATED, size=10_000).tolist()

    endless = numbers()
    return lambda: texts[next(endless)]


def _ready() -> int:
    """Resets the peak of this process's memory; returns the bytes that are resident now."""
    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


def make(folder: Path, path: Path) -> dict[str, float]:
    """Makes the index of a file; returns wall and CPU seconds, and the peak of memory."""
    tokenizer = qwen_tokenizer(folder / "qwen")
    columns = SourceConfig().columns
    spec = IndexSpec(SPEC.kind, SPEC.template, SPEC.image_tokens, tokenizer, columns)
    base = _ready()
    began, cpu = time.perf_counter(), cpu_seconds()
    with sampled(private_bytes) as samples:
        index = open_index(str(path), spec, "")
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    if not index.tokens.all():
        raise RuntimeError(f"{path}: expected no rejected record, got {next(index.rejected())}")
    memory = (resident_bytes("VmHWM") - base) / MIB
    processes = max(samples, default=base) / MIB
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "memory_mib": memory,
        "processes_mib": processes,
    }


def use(folder: Path, path: Path) -> dict[str, float]:
    """Opens the index of a file, plans an epoch and reads random records."""
    tokenizer = qwen_tokenizer(folder / "qwen")
    config = DataConfig({"llava": SourceConfig(str(path), str(folder))}, template=SPEC.template)
    base = _ready()
    began = time.perf_counter()
    [source] = open_sources(config, SPEC, tokenizer)
    opened = time.perf_counter()
    rows = plan_rows(config, [source], seed=0).rows_of(1)
    planned = time.perf_counter()
    reads = []
    for number in np.random.default_rng(0).integers(len(source), size=_READS).tolist():
        start = time.perf_counter()
        source[number]
        reads.append(1000 * (time.perf_counter() - start))
    return {
        "open_seconds": opened - began,
        "plan_seconds": planned - opened,
        "rows": rows,
        "read_median_ms": statistics.median(reads),
        "read_99_percent_ms": float(np.percentile(reads, 99)),
        "base_mib": base / MIB,
        "memory_mib": (resident_bytes("VmHWM") - base) / MIB,
    }


def measure_make(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Returns records a second and memory of the index of distinct records, of both formats."""
    results: dict[str, list[dict[str, float]]] = {"jsonl": [], "json": []}
    for format_ in results:
        write_records(folder / "distinct" / f"a.{format_}", count, distinct(folder))
    for _ in range(rounds):
        for format_, rows in results.items():
            path = folder / "distinct" / f"a.{format_}"
            rows.append(in_new_process(make, folder, path))
            (path.parent / ".index").rename(folder / f"{format_}-{len(rows)}")
    figures = {}
    for format_, rows in results.items():
        medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        figures[format_] = {
            "records_per_second": count / medians["seconds"],
            "cores": medians["cpu_seconds"] / medians["seconds"],
            "memory_mib": medians["memory_mib"],
            "processes_mib": medians["processes_mib"],
        }
    return figures


def measure(records: int, distinct_records: int, rounds: int) -> dict[str, Any]:
    """Returns the figures of both parts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("distinct", "large"):
            (folder / part).mkdir()
        result: dict[str, Any] = {"load": os.getloadavg()[0]}
        result["make"] = measure_make(folder, distinct_records, rounds)
        path = folder / "large" / "a.jsonl"
        write_records(path, records, repeated(folder))
        result["make_large"] = in_new_process(make, folder, path)
        uses = []
        for _ in range(rounds):
            forget(path.parent)
            uses.append(in_new_process(use, folder, path))
        result["use"] = {key: statistics.median(row[key] for row in uses) for key in uses[0]}
        return result | {"records": records, "distinct": distinct_records}


def main() -> None:
    """Entry point of `python -m benchmarks.data_index`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_index", description=__doc__)
    parser.add_argument("--records", type=int, default=5_000_000)
    parser.add_argument("--distinct", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.records, args.distinct, args.rounds)
    if args.json:
        print(json.dumps(result))
        return
    for part in ("make", "make_large", "use"):
        print(f"{part}: {json.dumps(result[part], indent=2)}")


if __name__ == "__main__":
    main()
