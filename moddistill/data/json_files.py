"""Random access to the records of JSONL files and of JSON files that are one list.

The places of records are found without parsing or loading the file: of the elements of a JSON list,
only strings and brackets are matched. Each record is parsed by itself, so a bad one costs no other,
unless it opens a string or a bracket of a list that it does not close.
"""

import functools
import json
import mmap
import os
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from moddistill.data.places import BLOCK_BYTES, LARGEST_RECORD, Block, in_blocks, read_places
from moddistill.errors import UserError, invalid

_BOM = b"\xef\xbb\xbf"
_SHOWN = 40  # bytes of a file that is no list

# Possessive repeats (`*+`) save no positions to go back to, which would take more memory than the
# text that they match, and time that grows with its square.
_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_LIST = re.compile(_SPACE + rb"\[" + _SPACE)
_CLOSING = re.compile(_SPACE + rb"\]" + _SPACE)
_SEPARATOR = re.compile(_SPACE + rb"," + _SPACE)
_SCALAR = re.compile(_STRING + rb'|[^ \t\n\r,\[\]{}"]++', re.DOTALL)  # or a word that is none
# The next bracket outside of strings; the group is set if it opens.
_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+(?:([\[{])|[\]}])", re.DOTALL)


class JsonFile:
    """The records of a `.jsonl` file or of a `.json` file."""

    def __init__(self, path: str):
        self.path = path
        self._lock = threading.Lock()
        self._closing: weakref.finalize | None = None
        self._descriptor = -1

    def __reduce__(self):
        return JsonFile, (self.path,)

    def extent(self) -> int:
        """Returns the number of bytes."""
        return os.path.getsize(self.path)

    def blocks(self) -> Iterator[Block]:
        """Yields all records, in order.

        Raises:
          UserError: for a `.json` file that is no list.
        """
        scan = _lines if self.path.endswith(".jsonl") else _elements
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
                if scan is _elements:
                    raise _no_list(self.path, b"")
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                start = len(_BOM) if content[: len(_BOM)] == _BOM else 0
                for places in in_blocks(_forgetting(content, scan(content, start, self.path))):
                    end = int(places.offset[-1]) + int(places.size[-1])
                    yield Block(places, end, functools.partial(read_places, self.read, places))

    def read(self, offset: int, size: int) -> Any:
        """Returns the fields of the record at a place.

        Raises:
          UserError: it is too long, not UTF-8 or not JSON.
        """
        if size > LARGEST_RECORD:
            raise UserError(f"record: expected at most {LARGEST_RECORD} bytes, got {size}")
        return _parse(os.pread(self._open(), size, offset))

    def _open(self) -> int:
        with self._lock:
            if self._closing is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                self._closing = weakref.finalize(self, os.close, self._descriptor)
            return self._descriptor

    def close(self) -> None:
        """Closes the file, which the next read opens again."""
        with self._lock:
            if self._closing is not None:
                self._closing()
            self._closing = None


def _parse(data: bytes) -> Any:
    try:
        return _DECODER.decode(data.decode())
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UserError(f"record: expected UTF-8 text, got {reason}") from None
    except UserError:
        raise
    # Besides syntax: an overlong number, values nested too deeply.
    except (ValueError, RecursionError) as error:
        raise UserError(f"record: expected JSON, got an error: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; of fields of one name, Python's parser would drop all but the last."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise invalid("name in a JSON object", repeated, "one that occurs once")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _forgetting(content: mmap.mmap, places: Iterator[Any]) -> Iterator[Any]:
    """Yields places and releases the pages before them, so that memory does not grow."""
    released = 0
    for place in places:
        yield place
        end = place[0] // mmap.PAGESIZE * mmap.PAGESIZE
        if end - released > BLOCK_BYTES:
            _release(content, released, end)
            released = end


def _release(content: mmap.mmap, begin: int, end: int) -> None:
    """Releases the pages of a range from memory; they are read again when used."""
    begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
    content.madvise(mmap.MADV_DONTNEED, begin, min(end, len(content)) - begin)


def _lines(content: mmap.mmap, start: int, _: str) -> Iterator[tuple[int, int, int]]:
    """Yields offset, size and number of the lines that are not blank."""
    line = 0
    while start < len(content):
        end = _end_of_line(content, start)
        line += 1
        size = end - start
        if size > LARGEST_RECORD or content[start:end].strip():
            yield start, size, line
        start = end + 1


def _end_of_line(content: mmap.mmap, start: int) -> int:
    """Returns the end of a line, and releases the pages of one that is longer than a block."""
    for begin in range(start, len(content), BLOCK_BYTES):
        end = content.find(b"\n", begin, begin + BLOCK_BYTES)
        if end >= 0:
            return end
        _release(content, begin, begin + BLOCK_BYTES)
    return len(content)


def _elements(content: mmap.mmap, start: int, path: str) -> Iterator[tuple[int, int, int]]:
    """Yields offset, size and number of the elements of a JSON list."""
    opening = _LIST.match(content, start)
    if opening is None:
        raise _no_list(path, content[start : start + _SHOWN])
    end = begin = opening.end()
    line = 0
    is_last = content[begin : begin + 1] == b"]"
    while not is_last:
        line += 1
        end = _end_of_element(content, begin)
        if end < 0:
            raise _broken(path, f"no element, or one that does not end, at byte {begin}")
        yield begin, end - begin, line
        separator = _SEPARATOR.match(content, end)
        is_last = separator is None
        begin = separator.end() if separator else end
    closing = _CLOSING.match(content, end)
    if closing is None:
        raise _broken(path, f"neither a comma nor the end of the list at byte {end}")
    if closing.end() != len(content):
        raise _broken(path, f"more text after the list, at byte {closing.end()}")


def _end_of_element(content: mmap.mmap, begin: int) -> int:
    """Returns the end of an element, -1 if there is none; brackets of objects are counted."""
    if content[begin : begin + 1] not in (b"{", b"["):
        scalar = _SCALAR.match(content, begin)
        return scalar.end() if scalar else -1
    depth, end = 0, begin
    while bracket := _BRACKET.match(content, end):
        depth += 1 if bracket.lastindex else -1
        end = bracket.end()
        if depth == 0:
            return end
    return -1


def _no_list(path: str, found: bytes) -> UserError:
    expected = "a JSON list of records (a file with a record on each line ends with .jsonl)"
    return invalid(path, found.decode(errors="replace"), expected)


def _broken(path: str, found: str) -> UserError:
    return UserError(f"{path}: expected a JSON list of records, got {found}")
