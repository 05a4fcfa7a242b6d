"""Shards of a conversion: each is a function of its records, and is written by one process.

A shard appears in the output folder when it is complete. Its counts and rejected records are in a
JSON file of the work folder, which appears first.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moddistill.data.array_records import writing_records
from moddistill.data.places import Places
from moddistill.errors import UserError
from moddistill.prepare.convert import Converted, Converter
from moddistill.prepare.inputs import Records
from moddistill.storage.json_file import write_json

_SHARD_BYTES = 256 * 2**20
_MOST_RECORDS = 2**16  # of a shard
_SAMPLED = 32  # records, from whose mean size the number of records in a shard follows


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive records of a file."""

    records: Records
    places: Places

    def __len__(self) -> int:
        return len(self.places)

    def part(self, start: int, stop: int) -> "Piece":
        """Returns the records from `start` to `stop`, those of them that there are."""
        inside = slice(max(start, 0), max(stop, 0))
        return Piece(self.records, Places(*(column[inside] for column in self.places)))

    def __iter__(self) -> Iterator[tuple[str, int, Any]]:
        """Yields file, line and the fields, or the `UserError`, of each record."""
        lines = self.places.line.tolist()
        for line, fields in zip(lines, self.records.fields(self.places), strict=True):
            yield self.records.name, line, fields


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of the output and the records that it is made of."""

    name: str
    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return sum(map(len, self.pieces))


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """Writes shards to `folder`, with temporary files in `work`; picklable."""

    converter: Converter
    folder: Path
    work: Path

    def is_written(self, shard: Shard) -> bool:
        """Returns whether a shard is complete."""
        return (self.folder / shard.name).is_file() and self.counts_file(shard).is_file()

    def counts_file(self, shard: Shard) -> Path:
        """Returns the JSON file with the counts and the rejected records of a shard."""
        return self.work / f"{shard.name}.json"

    def __call__(self, shard: Shard) -> int:
        """Writes a shard; returns its number of records before conversion."""
        partial = self.work / shard.name
        counts = {"records": len(shard), "usable": 0, "left_out": 0, "images": 0, "bytes": 0}
        rejected: list[tuple[str, int, str]] = []
        with writing_records(partial) as write:
            for file, line, result in converted(shard.pieces, self.converter):
                if isinstance(result, UserError):
                    rejected.append((file, line, str(result)))
                elif result is None:
                    counts["left_out"] += 1
                else:
                    write(result.data)
                    counts["usable"] += 1
                    counts["images"] += len(result.images)
                    counts["bytes"] += len(result.data)
        write_json(self.counts_file(shard), counts | {"rejected": rejected})
        partial.rename(self.folder / shard.name)
        return len(shard)


def list_pieces(records: Sequence[Records]) -> list[Piece]:
    """Finds the records of all files, in order; 16 bytes a record."""
    pieces = []
    for each in records:
        if blocks := list(each.places()):
            columns = map(np.concatenate, zip(*blocks, strict=True))
            pieces.append(Piece(each, Places(*columns)))
    return pieces


def split(pieces: Sequence[Piece], size: int) -> list[Shard]:
    """Splits records into shards of `size` records, named by their number and count."""
    total = sum(map(len, pieces))
    count = -(-total // size)
    return [
        Shard(
            f"{number:05d}-of-{count:05d}.array_record",
            tuple(_between(pieces, number * size, (number + 1) * size)),
        )
        for number in range(count)
    ]


def _between(pieces: Sequence[Piece], start: int, stop: int) -> Iterator[Piece]:
    for piece in pieces:
        part = piece.part(start, stop)
        if len(part):
            yield part
        start, stop = start - len(piece), stop - len(piece)


def records_per_shard(pieces: Sequence[Piece], converter: Converter) -> int:
    """Returns the number of records in about 256 MiB, from that of some at even distances."""
    total = sum(map(len, pieces))
    numbers = sorted({total * i // _SAMPLED for i in range(_SAMPLED)} if total else ())
    sample = [part for number in numbers for part in _between(pieces, number, number + 1)]
    sizes = [
        len(result.data)
        for _, _, result in converted(sample, converter)
        if isinstance(result, Converted)
    ]
    mean = max(1, sum(sizes) // len(sizes)) if sizes else 1
    return min(max(1, _SHARD_BYTES // mean), _MOST_RECORDS)


def converted(
    pieces: Iterable[Piece], converter: Converter
) -> Iterator[tuple[str, int, Converted | UserError | None]]:
    """Yields file, line and the converted record, the reason of its rejection, or None."""
    for piece in pieces:
        for file, line, fields in piece:
            yield file, line, _convert(converter, fields, file, line)


def _convert(
    converter: Converter, fields: Any, file: str, line: int
) -> Converted | UserError | None:
    if isinstance(fields, UserError):
        return fields
    try:
        return converter(fields, file, line)
    except UserError as error:
        return error
    except RecursionError:  # of the `repr` in an error message
        return UserError("record: expected values of a few levels, got deeply nested ones")
