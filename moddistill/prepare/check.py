"""Reads a source once and returns what its records are.

Numbers of 21 bytes a record and 28 bytes an image are held in memory, and a few blocks of records
in each process.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from moddistill.data.reasons import Reasons
from moddistill.data.record_files import find_files
from moddistill.data.worker_pool import worker_pool
from moddistill.errors import UserError, invalid
from moddistill.prepare.examine import ExamineSpec, Numbers, examine, merge
from moddistill.prepare.inputs import FileRecords, Records
from moddistill.prepare.parquet_rows import ParquetRecords
from moddistill.prepare.shards import Piece, list_pieces

_PART = 256  # records of one task
# Rows of parquet, which are decoded from the beginning of their row group.
_PARQUET_PART = 2**14
_SPEC: ExamineSpec  # of a worker


class Findings(NamedTuple):
    """What the records of a source are.

    Attributes:
      pieces: all records, by file.
      records: `examine.RECORD` [N].
      images: `examine.IMAGE` [I], of usable records.
      reasons: for which the others are rejected.
    """

    pieces: list[Piece]
    records: np.ndarray
    images: np.ndarray
    reasons: Reasons

    def place(self, number: int) -> str:
        """Returns file and number of a record, for messages."""
        for piece in self.pieces:
            if number < len(piece):
                return f"{piece.records.name}, record {piece.places.line[number]}"
            number -= len(piece)
        raise IndexError(number)


def check(path: str, spec: ExamineSpec, workers: int) -> Findings:
    """Examines all records of a source, with a progress bar.

    Args:
      path: file of records, or a pattern.
      workers: processes; 0 reads in this one.

    Raises:
      UserError: there is no file, or one is damaged as a whole.
    """
    if spec.images and not os.path.isdir(spec.images):
        raise invalid("--images", spec.images, "an existing folder")
    pieces = list_pieces([_open(file) for file in find_files(path)])
    if not pieces:
        raise UserError(f"{path}: expected records, got none")
    reasons = Reasons()

    def without_rejected(numbers: Numbers) -> Numbers:
        for rejected in numbers.rejected:
            reasons.add(rejected)
        bar.update(len(numbers.records))
        return numbers._replace(rejected=[])

    with tqdm(total=sum(map(len, pieces)), unit=" records") as bar:
        merged = merge(map(without_rejected, _examine_all(list(_parts(pieces)), spec, workers)))
    return Findings(pieces, merged.records, merged.images, reasons)


def _open(path: str) -> Records:
    return ParquetRecords(path) if path.endswith(".parquet") else FileRecords(path, path)


def _parts(pieces: Sequence[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        size = _PARQUET_PART if isinstance(piece.records, ParquetRecords) else _PART
        for start in range(0, len(piece), size):
            yield piece.part(start, start + size)


def _examine_all(parts: Sequence[Piece], spec: ExamineSpec, workers: int) -> Iterator[Numbers]:
    """Yields the numbers of all parts, in order."""
    if not workers:
        yield from (examine(part, spec) for part in parts)
        return
    waiting: deque[Future] = deque()
    with worker_pool(min(workers, len(parts)), _start, spec) as pool:
        for part in parts:
            waiting.append(pool.submit(_examine_in_worker, part))
            if len(waiting) > 4 * workers:  # so that results do not wait in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _start(spec: ExamineSpec) -> None:
    """Saves the spec in a worker: a tokenizer is too large to be sent with every part."""
    global _SPEC
    _SPEC = spec
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers use all cores already


def _examine_in_worker(part: Piece) -> Numbers:
    return examine(part, _SPEC)
