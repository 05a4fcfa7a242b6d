"""Inputs of a conversion: files of records, and the images that records name."""

import dataclasses
import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from moddistill.config import ColumnsConfig
from moddistill.data.forms import NO_COLUMNS
from moddistill.data.places import Places
from moddistill.data.record_files import open_file
from moddistill.errors import UserError, invalid
from moddistill.prepare.image_store import ImageStore
from moddistill.prepare.tar_members import check_uncompressed

_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_MOST_NAMES = 10**6


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputSpec:
    """The flags that decide what a conversion results in.

    Attributes:
      form: one of `packagings.FORMS`.
      sources: `--from`: files, patterns with `*` and `{000..123}`, or folders of downloads.
      images: `--images`: PATH or PREFIX=PATH of folders and archives.
      records: `--records`: pattern of members, or files, that have the records of archives.
      question: of captions of WebDataset.
      leave_out: prefixes of image names, whose records are left out.
      columns: names of the columns of a table.
    """

    form: str
    sources: tuple[str, ...]
    images: tuple[str, ...] = ()
    records: str = ""
    question: str = ""
    leave_out: tuple[str, ...] = ()
    columns: ColumnsConfig = NO_COLUMNS


@runtime_checkable
class Records(Protocol):
    """The records of one file; picklable.

    Attributes:
      name: of the file, in messages and in `rejected.jsonl`.
    """

    name: str

    def places(self) -> Iterator[Places]:
        """Yields the places of all records, in order."""

    def fields(self, places: Places) -> Iterator[Any]:
        """Yields the fields of each record, or the `UserError` of one that cannot be read."""


class Input(NamedTuple):
    """The records of a conversion.

    Attributes:
      records: the files of records, in order.
      images: the images that they name.
      paths: all files that were given, whose content a conversion depends on.
    """

    records: list[Records]
    images: ImageStore
    paths: list[str]


@dataclasses.dataclass(frozen=True)
class FileRecords:
    """The records of a `.json`, `.jsonl` or `.array_record` file.

    Attributes:
      path: of the file, or of its copy if it is in an archive.
    """

    name: str
    path: str

    def places(self) -> Iterator[Places]:
        return (block.places for block in open_file(self.path).blocks())

    def fields(self, places: Places) -> Iterator[Any]:
        file = open_file(self.path)
        try:
            for offset, size in zip(*places[:2], strict=True):
                yield value_or_error(file.read, int(offset), int(size))
        finally:
            file.close()


def value_or_error(read: Callable[..., Any], *args: Any) -> Any:
    """Returns `read(*args)`, or the `UserError` that it raises."""
    try:
        return read(*args)
    except UserError as error:
        return error


def find_files(patterns: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Returns the files that patterns with `*` and ranges such as `{000..123}` name.

    Raises:
      UserError: a pattern, or a name of a range, matches no file, or one without a suffix.
    """
    files = []
    for name in _names(patterns):
        found = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
        found = [file for file in found if os.path.isfile(file)]
        if not found:
            raise UserError(f"--from: expected files, got {name!r}, which matches none")
        for file in found:
            if not file.lower().endswith(tuple(suffixes)):
                if ".tar" in suffixes:
                    with open(file, "rb") as opened:
                        check_uncompressed(opened, file)
                raise invalid("--from", file, f"a file that ends with {' or '.join(suffixes)}")
        files += found
    return list(dict.fromkeys(files))


def _names(patterns: Sequence[str]) -> list[str]:
    """Returns the names of all ranges in patterns; UserError for more than any data set has."""
    names = (name for pattern in patterns for name in _expand(pattern))
    found = list(itertools.islice(names, _MOST_NAMES + 1))
    if len(found) > _MOST_NAMES:
        raise invalid("--from", ", ".join(patterns), f"ranges of at most {_MOST_NAMES:,} names")
    return found


def _expand(pattern: str) -> Iterator[str]:
    """Yields the names of the first range in a pattern, with as many digits, and of the others."""
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        name = f"{number:0{len(first)}d}"
        yield from _expand(pattern[: match.start()] + name + pattern[match.end() :])
