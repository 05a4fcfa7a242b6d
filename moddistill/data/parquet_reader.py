"""Opening of parquet files with `pyarrow`, and what it does not find out about damaged ones."""

import subprocess
import sys
from typing import Any

from moddistill.errors import UserError, one_line

_BUFFER = 2**20  # bytes that are read at one time, instead of a column of a group
# Bytes of a row group, and their ratio to those in the file, above which it is a bomb: `pyarrow`
# inflates a page in one piece.
_LARGEST_GROUP, _LARGEST_RATIO = 2**28, 1000
# Some damage is an exception of C++ that `pyarrow` does not catch.
_READ_FOOTER = """
import sys
import pyarrow.parquet
metadata = pyarrow.parquet.ParquetFile(sys.argv[1]).metadata
for group in map(metadata.row_group, range(metadata.num_row_groups)):
    for number in range(group.num_columns):
        group.column(number).statistics
"""


def open_reader(path: str) -> Any:
    """Opens a parquet file with `pyarrow`.

    Raises:
      UserError: `pyarrow` is not installed, or the file is not one of parquet, or one that inflates
        to a thousand times its size.
    """
    try:
        import pyarrow.parquet  # noqa: PLC0415  an extra
    except ImportError:
        raise UserError(
            f"{path}: expected pyarrow, which reads parquet, got none "
            "(pip install 'moddistill[parquet]')"
        ) from None
    try:
        reader = pyarrow.parquet.ParquetFile(
            path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
        )
        names, metadata = reader.schema_arrow.names, reader.metadata
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = one_line(str(error))
        raise UserError(f"{path}: expected a parquet file, got an error: {reason}") from error
    if len(set(names)) < len(names):
        raise UserError(f"{path}: expected columns of different names, got {one_line(str(names))}")
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        raise UserError(
            f"{path}: expected {metadata.num_rows} rows in its groups, got {sum(counts)}"
        )
    for group in range(metadata.num_row_groups):
        _check_inflated(path, metadata.row_group(group))
    return reader


def _check_inflated(path: str, group: Any) -> None:
    """Raises UserError for a row group that is large, and far larger than in the file."""
    if group.total_byte_size <= _LARGEST_GROUP:
        return
    columns = [group.column(number) for number in range(group.num_columns)]
    most = max(_LARGEST_GROUP, _LARGEST_RATIO * sum(each.total_compressed_size for each in columns))
    size = max(group.total_byte_size, sum(each.total_uncompressed_size for each in columns))
    if size > most:
        raise UserError(f"{path}: expected a row group of at most {most:,} bytes, got {size:,}")


def check_footer(path: str) -> None:
    """Raises UserError for a file whose column metadata end the process that reads them."""
    done = subprocess.run(
        [sys.executable, "-c", _READ_FOOTER, path], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = one_line((done.stderr.strip().splitlines() or ["none"])[-1].strip())
        raise UserError(f"{path}: expected a parquet file, got an error: {reason}")
