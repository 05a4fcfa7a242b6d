"""Reading of all records of a file for its index: parsed, rendered and tokenized in processes.

Each block of records becomes two files, its rows and what else was found, so that an interrupted
run continues after the blocks that are finished. At the end the blocks are joined.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moddistill.config import ColumnsConfig
from moddistill.data.examples import count_tokens
from moddistill.data.forms import parse_record
from moddistill.data.image_files import ImageFile
from moddistill.data.places import Block
from moddistill.data.record_files import RecordFile
from moddistill.data.records import AnyRecord
from moddistill.data.tokenizer import Tokenizer
from moddistill.data.worker_pool import worker_pool
from moddistill.errors import UserError
from moddistill.storage.json_file import read_json, write_json

_WORKERS = min(16, os.cpu_count() or 1)
_BLOCKS_WITHOUT_WORKERS = 8  # that are made in the time in which workers start
_VERSION = 2  # of the columns and of what they mean
COLUMNS = np.dtype(
    [
        ("offset", np.uint64), ("size", np.uint32), ("line", np.uint32), ("tokens", np.uint32),
        ("needed", np.uint32), ("images", np.uint16),
    ]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class IndexSpec:
    """What the numbers of an index depend on, besides the file."""

    kind: str
    template: str
    image_tokens: int
    tokenizer: Tokenizer
    columns: ColumnsConfig

    @functools.cached_property
    def key(self) -> str:
        """A digest of the spec."""
        columns = dataclasses.astuple(self.columns)
        content = [_VERSION, self.kind, self.template, self.image_tokens, columns]
        text = json.dumps([*content, self.tokenizer.digest])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def index_records(file: RecordFile, spec: IndexSpec, folder: Path) -> dict[str, int]:
    """Writes `columns.bin` and `rejected.jsonl` of a file of records to a folder.

    Returns:
      The number of `records`, of those `rejected`, and the line of the first one with an image in
      a file of its own, `first_named`, or 0.

    Raises:
      UserError: the file is not one of records.
    """
    parts = list(_parts(file, spec, folder))
    counts = _join(parts, folder)
    for part in parts:
        part.unlink()
        part.with_suffix(".json").unlink()
    return counts


def _parts(file: RecordFile, spec: IndexSpec, folder: Path) -> Iterator[Path]:
    """Makes the part of each block, with a progress bar; yields them in order."""
    waiting: deque[tuple[Path, Future, int]] = deque()
    bar = tqdm(
        total=file.extent(),
        desc=f"index of {Path(file.path).name}",
        mininterval=1.0,
        unit_scale=True,
        delay=1.0,
    )
    with bar, worker_pool(_WORKERS, _start_worker, file.path, spec) as pool:

        def finish() -> Path:
            part, future, end = waiting.popleft()
            future.result()
            bar.update(end - bar.n)
            return part

        for number, block in enumerate(file.blocks()):
            part = folder / f"part-{number:08d}.npy"
            if number < _BLOCKS_WITHOUT_WORKERS:
                _make_part(part, block, file.path, spec)
                bar.update(block.end - bar.n)
                yield part
                continue
            waiting.append((part, pool.submit(_make_part_in_worker, part, block), block.end))
            if len(waiting) > 2 * _WORKERS:  # so that memory does not grow with the file
                yield finish()
        while waiting:
            yield finish()


_FILE: tuple[str, IndexSpec]  # of a worker: a tokenizer is too large to be sent with each block


def _start_worker(path: str, spec: IndexSpec) -> None:
    global _FILE
    _FILE = path, spec


def _make_part_in_worker(part: Path, block: Block) -> None:
    _make_part(part, block, *_FILE)


def _make_part(part: Path, block: Block, path: str, spec: IndexSpec) -> None:
    """Writes the rows of a block of records, and what was found besides, unless they exist."""
    if part.is_file() and _is_intact(part, len(block.places)):
        return
    rows = np.zeros(len(block.places), COLUMNS)
    for name, values in block.places._asdict().items():
        rows[name] = values
    rejected, first_named = [], 0
    for row, fields in zip(rows, block.read(), strict=True):
        line = int(row["line"])
        try:
            record = _parse(fields, line, path, spec)
            counts = count_tokens(record, spec.template, spec.tokenizer, spec.image_tokens)
        except UserError as error:
            rejected.append([line, str(error)])
            continue
        row["tokens"], row["needed"] = counts
        row["images"] = min(len(record.images), np.iinfo(np.uint16).max)
        if not first_named and any(isinstance(image, ImageFile) for image in record.images):
            first_named = line
    write_json(part.with_suffix(".json"), {"rejected": rejected, "first_named": first_named})
    unfinished = part.with_suffix(".partial")
    with unfinished.open("wb") as file:
        np.save(file, rows)
    unfinished.rename(part)


def _is_intact(part: Path, count: int) -> bool:
    try:
        return len(np.load(part)) == count and bool(read_json(part.with_suffix(".json")))
    except (ValueError, OSError):
        return False


def _parse(fields: Any, line: int, path: str, spec: IndexSpec) -> AnyRecord:
    if isinstance(fields, UserError):
        raise fields
    place = {"kind": spec.kind, "file": path, "line": line, "image_root": ""}
    try:
        return parse_record(fields, **place, columns=spec.columns)
    except RecursionError:  # of the `repr` in an error message
        message = "record: expected values of a few levels, got deeply nested ones"
        raise UserError(message) from None


def _join(parts: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Writes the columns of all parts and the list of rejected records; returns the counts."""
    counts = [np.load(part, mmap_mode="r").shape[0] for part in parts]
    with (folder / "columns.bin").open("wb") as file:
        for name in COLUMNS.names:
            for part in parts:
                file.write(np.ascontiguousarray(np.load(part)[name]).tobytes())
    rejected, first_named = 0, 0
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as file:
        for part in parts:
            found = read_json(part.with_suffix(".json"))
            first_named = first_named or found["first_named"]
            rejected += len(found["rejected"])
            for item in found["rejected"]:
                file.write(json.dumps(item) + "\n")
    return {"records": sum(counts), "rejected": rejected, "first_named": first_named}
