"""Places of records in a file: what an index saves, and what a reader needs to find a record."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moddistill.errors import UserError

BLOCK_RECORDS = 2048
BLOCK_BYTES = 16 * 2**20
LARGEST_RECORD = 64 * 2**20  # bytes; a longer line or element is rejected without being read
_LARGEST_UINT32 = 2**32 - 1


class Places(NamedTuple):
    """Places of consecutive records.

    Attributes:
      offset: uint64, byte offset in a JSON file; row group in a parquet file.
      size: uint32, number of bytes in a JSON file; row within the row group in a parquet file.
      line: uint32, number of the record in its file, from 1.
    """

    offset: np.ndarray
    size: np.ndarray
    line: np.ndarray

    def __len__(self) -> int:
        # Of records, where a tuple has the number of its fields.
        return len(self.offset)


class Block(NamedTuple):
    """Consecutive records of a file.

    Attributes:
      end: how much of the file's `extent` ends with them.
      read: returns their fields, or the error of a record that cannot be read; in any thread.
    """

    places: Places
    end: int
    read: Callable[[], list[Any]]


def in_blocks(places: Iterable[tuple[int, int, int]]) -> Iterator[Places]:
    """Groups (offset, size in bytes, line) to blocks of a limited number of records and bytes."""
    block, total = [], 0
    for place in places:
        block.append(place)
        total += place[1]
        if len(block) == BLOCK_RECORDS or total >= BLOCK_BYTES:
            yield _block(block)
            block, total = [], 0
    if block:
        yield _block(block)


def _block(places: list[tuple[int, int, int]]) -> Places:
    offset, size, line = zip(*places, strict=True)
    capped = np.minimum(np.array(size, np.uint64), _LARGEST_UINT32)
    return Places(np.array(offset, np.uint64), capped.astype(np.uint32), np.array(line, np.uint32))


def read_places(read: Callable[[int, int], Any], places: Places) -> list[Any]:
    """Returns the fields of each record, or the error of one that cannot be read."""
    return [_or_error(read, int(o), int(s)) for o, s in zip(*places[:2], strict=True)]


def _or_error(read: Callable[[int, int], Any], offset: int, size: int) -> Any:
    try:
        return read(offset, size)
    except UserError as error:
        return error
