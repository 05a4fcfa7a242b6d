"""Files of records by their names: JSON, JSONL, parquet and ArrayRecord."""

import glob
import os
import unicodedata

from moddistill.data.array_records import ArrayRecordFile
from moddistill.data.json_files import JsonFile
from moddistill.data.parquet_files import ParquetFile
from moddistill.errors import UserError, invalid

RecordFile = JsonFile | ParquetFile | ArrayRecordFile
_FORMATS = {
    ".json": JsonFile,
    ".jsonl": JsonFile,
    ".parquet": ParquetFile,
    ".array_record": ArrayRecordFile,
}


def find_files(path: str) -> list[str]:
    """Returns the files of a source, sorted: the one of that name, or those that match a pattern.

    Raises:
      UserError: there is none, or one is not of a known format or cannot be read.
    """
    # A name with `[` may be that of a file as well.
    files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    files = [file for file in files if os.path.isfile(file)]
    if not files:
        raise UserError(f"{path}: expected a file, or a pattern of files, got none")
    for file in files:
        if os.path.splitext(file)[1] not in _FORMATS:
            raise invalid("name of a file of records", file, f"one that ends with {_suffixes()}")
        # Names are in logs and terminals.
        if {"Cc", "Cs"} & set(map(unicodedata.category, file)):
            raise invalid("name of a file of records", file, "no control characters")
        if not os.access(file, os.R_OK):
            raise UserError(f"{file}: expected a file that may be read, got no permission")
    return files


def open_file(path: str) -> RecordFile:
    """Returns the reader of a file, which it opens when it is used."""
    return _FORMATS[os.path.splitext(path)[1]](path)


def _suffixes() -> str:
    *others, last = _FORMATS
    return f"{', '.join(others)} or {last}"
