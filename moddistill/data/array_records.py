"""Records with embedded images as bytes, the content of ArrayRecord shards.

    magic `MDR1` | length of the header, uint32 | header | bytes of the images, one after the other

Integers are little-endian. The header is a JSON object: the fields of the record as they were
published, in which `images` is a list of `{"path": name, "size": number of bytes}`.
"""

import contextlib
import functools
import itertools
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from moddistill.data.image_files import EmbeddedImage
from moddistill.data.places import BLOCK_RECORDS, Block, Places, read_places
from moddistill.errors import UserError, one_line

_MAGIC = b"MDR1"
_START = struct.Struct("<4sI")
# A read decodes a whole group, by default one record. Images hardly get smaller by compression.
_OPTIONS = "group_size:1,zstd:1,max_parallelism:1"
_OPEN_READERS = 64  # of all files; each has a file descriptor


def pack_record(fields: Mapping[str, Any], images: Sequence[EmbeddedImage]) -> bytes:
    """Returns the bytes of a record whose `images` are embedded.

    Args:
      fields: of the published record, in which `images` replaces a field of that name.
    """
    content = {name: value for name, value in fields.items() if name != "images"}
    if images:
        content["images"] = [{"path": image.name, "size": len(image.data)} for image in images]
    header = json.dumps(content, ensure_ascii=False).encode(errors="surrogatepass")
    return b"".join([_START.pack(_MAGIC, len(header)), header, *(image.data for image in images)])


def unpack_record(data: bytes) -> dict[str, Any]:
    """Returns the fields, in which `images` is a list of `{"path": name, "bytes": data}`.

    Raises:
      UserError: for bytes that `pack_record` did not write.
    """
    if len(data) < _START.size or data[:4] != _MAGIC:
        raise UserError(f"record: expected bytes that begin with {_MAGIC!r}, got {data[:4]!r}")
    start = _START.size + _START.unpack_from(data)[1]
    try:
        fields = json.loads(data[_START.size : start])
        images = [(image["path"], index(image["size"])) for image in fields.get("images", ())]
        ends = list(itertools.accumulate((size for _, size in images), initial=start))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = one_line(str(error))
        raise UserError(f"record: expected a header in JSON, got an error: {reason}") from None
    if ends[-1] != len(data) or ends != sorted(ends):
        raise UserError(f"record: expected {one_line(str(ends[-1]))} bytes, got {len(data)}")
    if images:
        fields["images"] = [
            {"path": path, "bytes": data[begin:end]}
            for (path, _), (begin, end) in zip(images, itertools.pairwise(ends), strict=True)
        ]
    return fields


class ArrayRecordFile:
    """The records of an ArrayRecord file that `pack_record` made."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return ArrayRecordFile, (self.path,)

    def extent(self) -> int:
        """Returns the number of records."""
        return _reader(self).num_records()

    def blocks(self) -> Iterator[Block]:
        """Yields all records, in order; they are found by number.

        The bytes of an image are `b"-"` in them.
        """
        count = self.extent()
        for start in range(0, count, BLOCK_RECORDS):
            numbers = np.arange(start, min(start + BLOCK_RECORDS, count), dtype=np.uint32)
            offset = numbers.astype(np.uint64)
            places = Places(offset, np.zeros_like(numbers), numbers + np.uint32(1))
            read = functools.partial(read_places, self._without_image_bytes, places)
            yield Block(places, start + len(places), read)

    def read(self, offset: int, size: int) -> Any:
        """Returns the fields of record number `offset`, from 0; `size` is not used.

        Raises:
          UserError: the bytes are damaged or have another content.
        """
        return unpack_record(self.read_bytes(offset))

    def read_bytes(self, number: int) -> bytes:
        """Returns the bytes of a record; UserError if they are damaged."""
        try:
            [data] = _reader(self).read([number])
        except RuntimeError as error:
            reason = one_line(str(error))
            raise UserError(f"record: expected undamaged bytes, got an error: {reason}") from None
        return data

    def _without_image_bytes(self, offset: int, size: int) -> Any:
        """Returns the fields without large values, so that many records fit into memory."""
        fields = self.read(offset, size)
        for image in fields.get("images", ()):
            image["bytes"] = image["bytes"] and b"-"
        return fields

    def close(self) -> None:
        """Closes the readers of all files."""
        _reader.cache_clear()


@functools.lru_cache(_OPEN_READERS)
def _reader(file: ArrayRecordFile) -> Any:
    """Returns an open reader, which threads may share.

    Raises:
      UserError: the file is not one of ArrayRecord, or its end is missing.
    """
    reader = array_record_module.ArrayRecordReader(file.path)
    if not reader.ok():
        # It has no records then, and reports why when it is closed.
        try:
            reader.close()
            reason = "no end"
        except RuntimeError as error:
            reason = one_line(str(error)) or "no end"
        raise UserError(f"{file.path}: expected a whole ArrayRecord file, got an error: {reason}")
    return reader


@contextlib.contextmanager
def writing_records(path: Path, together: int = 1) -> Iterator[Any]:
    """Yields the function that appends to an ArrayRecord file, which is on the disk at the end.

    Args:
      together: records that are read at one time, of which each group takes about 160 bytes more.
    """
    options = _OPTIONS.replace("group_size:1", f"group_size:{together}")
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    try:
        try:
            yield writer.write
        finally:
            writer.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except RuntimeError as error:  # of the writer, which has no other type
        raise UserError(f"{path}: expected a disk with enough space, got {error}") from None
