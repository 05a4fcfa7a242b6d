"""Tables of questions as tab-separated values with images in base64 (MMBench, VLMEvalKit).

Columns are found by the header. `question` and `answer` are needed; `image` is base64, `image_path`
a name; `hint` goes before the question, and options in `A`, `B`, ... after it. Empty cells, `nan`
and `none` count as absent. Rows of MMBench whose `image` is the index of another row are rejected.
"""

import base64
import binascii
import csv
import dataclasses
import io
import string
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from moddistill.data.places import LARGEST_RECORD, Places, in_blocks
from moddistill.errors import UserError, invalid
from moddistill.prepare.inputs import value_or_error

_BOM = b"\xef\xbb\xbf"
_EMPTY = ("", "nan", "none")
_MOST_LINES = 1000  # of a row
_WITH_OPTIONS = "Answer with the option's letter from the given choices directly."

# A limit of the process; the default is too small for an image.
csv.field_size_limit(LARGEST_RECORD)


@dataclasses.dataclass(frozen=True)
class TsvRecords:
    """The rows of a table after its header. A row may have line breaks within quotes."""

    name: str

    def places(self) -> Iterator[Places]:
        with open(self.name, "rb") as file:
            self._header(file)
            yield from in_blocks(_rows(file))

    def fields(self, places: Places) -> Iterator[Any]:
        with open(self.name, "rb") as file:
            header = self._header(file)
            for offset, size in zip(*places[:2], strict=True):
                yield value_or_error(_read, file, header, int(offset), int(size))

    def _header(self, file: BufferedIOBase) -> list[str]:
        """Returns the names of the columns, and leaves the file at the first row."""
        line = file.readline(LARGEST_RECORD).removeprefix(_BOM)
        header = line.decode(errors="replace").rstrip("\r\n").split("\t")
        for name in ("question", "answer"):
            if name not in header:
                raise invalid(f"header of {self.name}", header, f"a column {name!r}")
        return header


def _rows(file: BufferedIOBase) -> Iterator[tuple[int, int, int]]:
    """Yields offset, size and number of the rows that are not blank."""
    number, begin = 0, file.tell()
    while line := file.readline(LARGEST_RECORD + 1):
        size = len(line)
        while not line.endswith(b"\n") and (rest := file.readline(LARGEST_RECORD)):
            size, line = size + len(rest), rest  # too long a row, of which only the size counts
        if size <= LARGEST_RECORD and b'"' in line:
            size = _quoted_size(file, line)
        if size > LARGEST_RECORD or line.strip():
            number += 1
            yield begin, size, number
        begin += size


def _quoted_size(file: BufferedIOBase, first: bytes) -> int:
    """Returns the bytes of a row that begins with a line and may go on within quotes.

    A row whose quotes do not end is its first line: it is rejected, and costs no other row.
    """
    size, after = 0, file.tell()

    def lines() -> Iterator[str]:
        nonlocal size
        line = first
        for _ in range(_MOST_LINES):
            size += len(line)
            if not line or size > LARGEST_RECORD:
                return
            yield line.decode(errors="replace")
            line = file.readline(LARGEST_RECORD + 1)

    try:
        next(csv.reader(lines(), delimiter="\t", strict=True))
    except csv.Error:
        file.seek(after)
        return len(first)
    return size


def _read(file: BufferedIOBase, header: list[str], offset: int, size: int) -> dict[str, Any]:
    if size > LARGEST_RECORD:
        raise invalid("bytes of the row", size, f"<= {LARGEST_RECORD:,}")
    file.seek(offset)
    try:
        text = io.StringIO(file.read(size).decode(), newline="\n")
        [row] = csv.reader(text, delimiter="\t", strict=True)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"row: expected tab-separated UTF-8 text, got an error: {error}") from None
    if len(row) != len(header):
        raise invalid("cells of the row", len(row), f"{len(header)}, as in the header")
    return _conversation(dict(zip(header, row, strict=True)))


def _conversation(row: dict[str, str]) -> dict[str, Any]:
    hint = [row["hint"]] if _filled(row, "hint") else []
    options = [f"{name}. {row[name]}" for name in string.ascii_uppercase if _filled(row, name)]
    instruction = [_WITH_OPTIONS] if options else []
    if options and row["answer"] in string.ascii_uppercase and not _filled(row, row["answer"]):
        raise invalid("answer", row["answer"], "one of the options")
    texts = {
        "user": "\n".join([*hint, row["question"], *options, *instruction]),
        "assistant": row["answer"],
    }
    fields = {"messages": [{"role": role, "content": text} for role, text in texts.items()]}
    if _filled(row, "index"):
        fields["id"] = row["index"]
    if _filled(row, "image"):
        fields["image"] = {"path": row.get("image_path", ""), "bytes": _image(row["image"])}
    elif _filled(row, "image_path"):
        fields["image"] = row["image_path"]
    return fields


def _image(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not data:
        raise invalid("image", text, "base64 of an image")
    return data


def _filled(row: dict[str, str], name: str) -> bool:
    return row.get(name, "").strip().lower() not in _EMPTY
