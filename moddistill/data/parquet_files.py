"""Random access to the rows of parquet files with embedded images.

Parquet has no access below a row group. A small group is read as a whole and cached; a large one is
decoded batch by batch up to the row, so that memory does not grow with it. It still takes three
times the memory of a page, which `pyarrow` ends after 1,024 images at the earliest, so one thread
does it at a time. Shuffled reads of large groups are slow: `python -m moddistill.prepare parquet`
converts such files.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from moddistill.data.parquet_reader import check_footer, open_reader
from moddistill.data.places import BLOCK_RECORDS, Block, Places
from moddistill.errors import UserError, one_line

_CACHED_GROUP = 32 * 2**20  # bytes of a row group in memory
_CACHED_GROUPS = 4  # of all files
_KNOWN_GROUPS = 2**16  # of all files
_FIRST_ROWS = 16  # whose size stands for that of the others
_OPEN_READERS = 64  # of all files and threads; each has a file descriptor
_BATCH = 4 * 2**20  # bytes of a batch of rows
_LARGE_GROUP = threading.Lock()


class ParquetFile:
    """The rows of a parquet file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return ParquetFile, (self.path,)

    def extent(self) -> int:
        """Returns the number of rows."""
        return self._reader().metadata.num_rows

    def is_slow_to_shuffle(self) -> bool:
        """Returns whether a row group is too large to be cached."""
        metadata = self._reader().metadata
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        return any(group.total_byte_size > _CACHED_GROUP for group in groups)

    def blocks(self) -> Iterator[Block]:
        """Yields all rows, in order, without the bytes of images.

        An image is `{"bytes": b"-", "path": ...}` in them. Rows that cannot be decoded, because
        their row group is damaged, are errors.
        """
        reader, line = self._reader(), 1
        check_footer(self.path)
        for group in range(reader.metadata.num_row_groups):
            count = reader.metadata.row_group(group).num_rows
            for start, stop, read in _scan(reader, group, count):
                rows = np.arange(start, stop, dtype=np.uint32)
                places = Places(np.full(len(rows), group, np.uint64), rows, line + rows)
                yield Block(places, line + stop - 1, read)
            line += count

    def read(self, offset: int, size: int) -> Any:
        """Returns the fields of row `size` of row group `offset`.

        Raises:
          UserError: it cannot be decoded.
        """
        reader = self._reader()
        with _decoding():
            row_bytes = _row_bytes_of_group(self, offset)
        if row_bytes * reader.metadata.row_group(offset).num_rows <= _CACHED_GROUP:
            with _decoding():
                group = _row_group(self, offset)
            return _row(group, size)
        with _LARGE_GROUP:
            try:
                return _row_of_large_group(reader, offset, size, row_bytes)
            finally:
                _release_memory()

    def _reader(self) -> Any:
        return _thread_reader(self, threading.get_ident())

    def close(self) -> None:
        """Drops the cached row groups and readers of all files."""
        _row_group.cache_clear()
        _row_bytes_of_group.cache_clear()
        _thread_reader.cache_clear()


@functools.lru_cache(_CACHED_GROUPS)
def _row_group(file: ParquetFile, group: int) -> Any:
    rows = file._reader().read_row_group(group, use_threads=False)
    _release_memory()
    return rows


@functools.lru_cache(_KNOWN_GROUPS)
def _row_bytes_of_group(file: ParquetFile, group: int) -> int:
    with _LARGE_GROUP:
        try:
            return _row_bytes(file._reader(), group)
        finally:
            _release_memory()


def _row_of_large_group(reader: Any, group: int, row: int, row_bytes: int) -> dict[str, Any]:
    for batch in _batches(reader, group, None, row_bytes):
        if row < len(batch):
            return _row(batch, row)
        row -= len(batch)
    raise UserError(f"row: expected {row + 1} more rows in row group {group}, got none")


@functools.lru_cache(_OPEN_READERS)
def _thread_reader(file: ParquetFile, _: int) -> Any:
    """Returns a reader for one thread, since readers are not safe to share."""
    return open_reader(file.path)


def _release_memory() -> None:
    """Gives memory that this thread has freed back to the system."""
    import pyarrow  # noqa: PLC0415

    pyarrow.default_memory_pool().release_unused()


@contextlib.contextmanager
def _decoding() -> Iterator[None]:
    """Raises UserError for data that cannot be decoded; errors of the disk stay as they are."""
    import pyarrow  # noqa: PLC0415

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None):
            raise
        reason = one_line(str(error))
        raise UserError(f"row: expected a readable row group, got an error: {reason}") from error


def _scan(reader: Any, group: int, count: int) -> Iterator[tuple[int, int, Callable[[], list]]]:
    """Yields first row, end and reading function of consecutive rows, without bytes of images."""
    done = 0
    try:
        with _decoding():
            columns, images = _without_image_bytes(reader, group)
            row_bytes = _row_bytes(reader, group, columns)
        for batch in _batches(reader, group, columns, row_bytes):
            start, done = done, done + len(batch)
            yield start, done, functools.partial(_rows, batch, images)
    except UserError as error:
        if done < count:
            yield done, count, functools.partial(list, [error] * (count - done))


def _batches(
    reader: Any, group: int, columns: Sequence[str] | None, row_bytes: int
) -> Iterator[Any]:
    """Yields the rows of a row group as record batches of a limited size."""
    rows = min(max(_BATCH // row_bytes, 1), BLOCK_RECORDS)
    with _decoding():
        yield from reader.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


def _row_bytes(reader: Any, group: int, columns: Sequence[str] | None = None) -> int:
    """Returns about the bytes of a row in memory, at least 1.

    They are those that are stored, or those of the first rows: a value that repeats, such as an
    image with several questions, is stored once.
    """
    metadata = reader.metadata.row_group(group)
    stored = sum(
        metadata.column(number).total_uncompressed_size
        for number in range(metadata.num_columns)
        if columns is None or reader.schema.column(number).path in columns
    )
    options = {"row_groups": [group], "columns": columns, "use_threads": False}
    first = next(reader.iter_batches(_FIRST_ROWS, **options), None)
    decoded = first.nbytes // len(first) if first else 0
    return max(1, stored // max(metadata.num_rows, 1), decoded)


def _without_image_bytes(reader: Any, group: int) -> tuple[list[str], set[str]]:
    """Returns the columns of a row group without those of the bytes of images.

    If some bytes are null, they are needed to know which records have an image.

    Returns:
      Their paths, and the names of the fields whose images lack their bytes.
    """
    names = [field.name for field in reader.schema_arrow if _is_image(field.type)]
    columns, images = [], set()
    for number in range(len(reader.schema)):
        path = reader.schema.column(number).path
        name = next((name for name in names if path.startswith(f"{name}.")), None)
        if name and path.endswith(".bytes") and _has_no_nulls(reader, group, number):
            images.add(name)
        else:
            columns.append(path)
    return columns, images


def _has_no_nulls(reader: Any, group: int, column: int) -> bool:
    statistics = reader.metadata.row_group(group).column(column).statistics
    return bool(statistics and statistics.has_null_count and statistics.null_count == 0)


def _is_image(kind: Any) -> bool:
    """Returns whether a type is `{bytes, path}` or a list of it, as `datasets` writes images."""
    import pyarrow  # noqa: PLC0415

    kind = getattr(kind, "value_type", kind)
    is_struct = isinstance(kind, pyarrow.StructType)
    return is_struct and {"bytes", "path"} <= {field.name for field in kind}


def _rows(batch: Any, images: set[str]) -> list[Any]:
    """Returns the fields of each row, or the error of one that cannot be read."""
    try:
        rows = batch.to_pylist()
    except Exception:  # of any of the rows
        rows = [_row_or_error(batch, number) for number in range(len(batch))]
    for row in rows:
        if not isinstance(row, UserError):
            row.update({name: _with_bytes(row[name]) for name in images})
    return rows


def _row_or_error(rows: Any, number: int) -> Any:
    try:
        return _row(rows, number)
    except UserError as error:
        return error


def _row(rows: Any, number: int) -> dict[str, Any]:
    try:
        return rows.slice(number, 1).to_pylist()[0]
    except Exception as error:  # conversions to Python raise many types
        reason = one_line(str(error))
        raise UserError(f"row: expected values of Python, got an error: {reason}") from error


def _with_bytes(value: Any) -> Any:
    """Returns images, read without their bytes, as if they had some."""
    if isinstance(value, list):
        return [_with_bytes(each) for each in value]
    return None if value is None else {"bytes": b"-"} | value
