"""Files inside of zip and tar archives, read in place: nothing is extracted.

1. `index_archive` lists the members once, without reading them, and saves 42 bytes for each, sorted
   by a 64-bit hash of the name.
2. Each process maps the index and reads members by name, with bounds on what it reads.

A member that is no plain file of its own inside of the archive is in the index with its fault, and
reading it is an error.
"""

import functools
import hashlib
import os
import posixpath
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moddistill.errors import UserError

LARGEST_IMAGE = 256 * 2**20  # bytes
# An index has the number of a fault.
FAULTS = (
    "",
    "a name that leads out of the archive",
    "a link",
    "a device, pipe or sparse file",
    "several members of this name",
    "an encrypted member",
    "a compression other than deflate",
    "a member that ends after the archive",
)
OUTSIDE, LINK, SPECIAL, DUPLICATE, ENCRYPTED, COMPRESSION, TRUNCATED = range(1, len(FAULTS))
_PIECE = 2**20  # bytes that are read and inflated at one time
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: magic, length of name, of extra
_ROW = np.dtype(
    [
        ("key", "<u8"),
        ("offset", "<u8"),
        ("stored", "<u8"),
        ("size", "<u8"),
        ("crc", "<i8"),
        ("is_deflated", "?"),
        ("fault", "u1"),
    ]
)


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
      offset: byte of the archive at which its content begins; in a zip, its local header.
      stored: bytes in the archive.
      size: bytes of the file.
      crc: CRC-32 of the file; -1 in a tar, which has none.
      fault: index of `FAULTS`; 0 for a file that may be read.
    """

    name: str
    offset: int
    stored: int
    size: int
    crc: int = -1
    is_deflated: bool = False
    fault: int = 0


def normalize(name: str) -> str:
    """Returns the name of a file inside of a folder or archive, without `./` and `//`.

    Raises:
      UserError: it is empty, absolute, or leads outside by `..`.
    """
    plain = name.replace("\\", "/")
    if not plain.strip("./") or plain[0] == "/" or ".." in plain.split("/") or "\0" in plain:
        raise UserError(f"image name: expected one inside of its folder or archive, got {name!r}")
    return posixpath.normpath(plain)


def index_archive(members: Iterable[Member], index: Path) -> list[str]:
    """Writes the index of an archive, and returns the names of its `.json` and `.jsonl` members."""
    records: list[str] = []
    rows = np.fromiter(_rows(members, records), _ROW)
    rows = rows[np.argsort(rows["key"], kind="stable")]
    is_same = rows["key"][1:] == rows["key"][:-1]
    rows["fault"][1:][is_same] = rows["fault"][:-1][is_same] = DUPLICATE
    np.save(index, rows)
    return records


def _rows(members: Iterable[Member], records: list[str]) -> Iterator[tuple[int | bool, ...]]:
    for member in members:
        try:
            name, fault = normalize(member.name), member.fault
        except UserError:
            name, fault = member.name, OUTSIDE
        if name.lower().endswith((".json", ".jsonl")) and not fault:
            records.append(name)
        yield _key(name), *member[1:-1], fault


def _key(name: str) -> int:
    data = name.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Archive:
    """The members of an archive that has been indexed.

    Args:
      path: a zip or tar file.
      index: the file that `index_archive` wrote.
    """

    def __init__(self, path: str, index: str):
        self.path = path
        self._rows = np.load(index, mmap_mode="r")
        self._keys = np.ascontiguousarray(self._rows["key"])
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def find(self, name: str) -> Member | None:
        """Returns the member of a normalized name, or None."""
        key = _key(name)
        row = int(np.searchsorted(self._keys, np.uint64(key)))
        if row == len(self._keys) or self._keys[row] != key:
            return None
        return Member(name, *self._rows[row].item()[1:])

    def read(self, member: Member) -> bytes:
        """Returns the content of an image; UserError as `pieces`, and if it is too large."""
        if member.size > LARGEST_IMAGE:
            raise self._broken(member, f"at most {LARGEST_IMAGE:,} bytes", f"{member.size:,}")
        return b"".join(self.pieces(member))

    def pieces(self, member: Member) -> Iterator[bytes]:
        """Yields the content of a member.

        Raises:
          UserError: it has a fault, or is not as large as the archive notes or otherwise damaged.
        """
        if member.fault:
            raise self._broken(member, "a plain file", FAULTS[member.fault])
        size, crc = 0, 0
        try:
            for piece in self._inflated(member):
                size, crc = size + len(piece), zlib.crc32(piece, crc)
                if size > member.size:
                    break
                yield piece
        except zlib.error as error:
            raise self._broken(member, "an undamaged member", f"an error: {error}") from None
        if size != member.size:
            got = "more" if size > member.size else f"{size:,}"
            raise self._broken(member, f"{member.size:,} bytes, as the archive notes", got)
        if member.crc not in (-1, crc):
            raise self._broken(member, "an undamaged member", "another CRC-32")

    def _inflated(self, member: Member) -> Iterator[bytes]:
        """Yields pieces of a bounded size, however small their compressed form is."""
        if not member.is_deflated:
            yield from self._stored(member)
            return
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        for piece in self._stored(member):
            while piece and not inflater.eof:
                yield inflater.decompress(piece, _PIECE)
                piece = inflater.unconsumed_tail
        while not inflater.eof:
            rest = inflater.decompress(b"", _PIECE)
            if not rest:
                return
            yield rest

    def _stored(self, member: Member) -> Iterator[bytes]:
        start = member.offset
        if member.crc >= 0:
            header = os.pread(self._descriptor, _LOCAL_HEADER.size, start)
            if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
                raise self._broken(member, "a local header", "other bytes")
            _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            start += _LOCAL_HEADER.size + name_length + extra_length
        end = start + member.stored
        while start < end:
            piece = os.pread(self._descriptor, min(_PIECE, end - start), start)
            if not piece:
                return
            yield piece
            start += len(piece)

    def _broken(self, member: Member, expected: str, found: str) -> UserError:
        return UserError(f"{member.name!r} in {self.path}: expected {expected}, got {found}")


@functools.cache
def open_archive(path: str, index: str) -> Archive:
    """Returns the archive, opened once in each process."""
    return Archive(path, index)
