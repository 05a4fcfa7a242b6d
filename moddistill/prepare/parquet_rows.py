"""Rows of parquet files in order, as a conversion reads them.

Any parquet file with the fields of a published form: RLAIF-V, FineVision, TRL, or a table whose
columns are named by flags. Images are `{bytes, path}`, a list of them, or names.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from moddistill.data.parquet_reader import open_reader
from moddistill.data.places import BLOCK_RECORDS, Places
from moddistill.errors import UserError, one_line
from moddistill.prepare.inputs import value_or_error

_BATCH = 16  # rows that exist at one time


@dataclasses.dataclass(frozen=True)
class ParquetRecords:
    """The rows of a parquet file, decoded in batches that do not cross a row group."""

    name: str

    def places(self) -> Iterator[Places]:
        metadata, line = open_reader(self.name).metadata, 1
        for group in range(metadata.num_row_groups):
            count = metadata.row_group(group).num_rows
            for start in range(0, count, BLOCK_RECORDS):
                rows = np.arange(start, min(start + BLOCK_RECORDS, count), dtype=np.uint32)
                yield Places(np.full(len(rows), group, np.uint64), rows, line + rows)
            line += count

    def fields(self, places: Places) -> Iterator[Any]:
        reader = open_reader(self.name)
        for group in np.unique(places.offset).tolist():
            rows = places.size[places.offset == group]
            yield from self._rows(reader, group, int(rows[0]), int(rows[-1]) + 1)

    def _rows(self, reader: Any, group: int, begin: int, end: int) -> Iterator[Any]:
        """Yields the rows from `begin` to `end` of a row group."""
        row, reason = 0, "fewer rows than the file declares"
        try:
            for batch in reader.iter_batches(_BATCH, row_groups=[group]):
                for inside in range(max(begin - row, 0), min(end - row, len(batch))):
                    yield value_or_error(_row, batch, inside)
                row += len(batch)
                begin = max(row, begin)
                if begin >= end:
                    return
        except (ValueError, RuntimeError, OSError, MemoryError) as error:  # of pyarrow
            reason = one_line(str(error))
        for _ in range(begin, end):
            yield UserError(f"row: expected a readable row group, got an error: {reason}")


def _row(batch: Any, number: int) -> dict[str, Any]:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise UserError(f"row: expected UTF-8 text, got {error.reason} in a column") from None
