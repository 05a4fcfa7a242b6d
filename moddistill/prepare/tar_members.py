"""Lists the members of uncompressed tar archives.

A compressed tar has no random access: it is refused with the command that decompresses it.
"""

import tarfile
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any, NamedTuple

from moddistill.errors import UserError
from moddistill.prepare.archives import LINK, SPECIAL, Member

_LARGEST_HEADER = 2**20  # bytes, with the extended headers of one member
_LARGEST_MEMBER = 2**62  # bytes; a header may declare 2**95
_COMPRESSIONS = {
    b"\x1f\x8b": "gzip -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ": "xz -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
}


class TarMember(NamedTuple):
    """A member of a tar, and the byte range of its headers, content and padding."""

    member: Member
    start: int
    end: int


def list_tar(path: str) -> Iterator[Member]:
    """Yields the members of a tar archive that are no folders; UserError as `read_headers`."""
    with open(path, "rb") as file:
        check_uncompressed(file, path)
        for each in read_headers(file, path):
            yield each.member


def check_uncompressed(file: BufferedIOBase, path: str) -> None:
    """Raises UserError if the file begins as a compressed one."""
    start = file.read(8)
    for magic, command in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise UserError(
                f"{path}: expected an uncompressed tar archive, got a compressed one; "
                f"`{command}` decompresses it"
            )
    file.seek(0)


def read_headers(file: BufferedIOBase, path: str) -> Iterator[TarMember]:
    """Yields the members of a tar archive that are no folders, without reading their content.

    Raises:
      UserError: the file is no tar archive, or is damaged after the members that were yielded.
    """
    reads = _BoundedReads(file)
    try:
        with tarfile.open(fileobj=reads, mode="r:") as archive:
            for info in archive:
                # After a negative size, the next header is an earlier one, without end.
                if not 0 <= info.size < _LARGEST_MEMBER:
                    raise tarfile.ReadError(f"a member of {info.size} bytes")
                if not info.isdir():
                    yield _tar_member(info)
                archive.members = []  # which would hold all of them
                reads.allowance = _LARGEST_HEADER
    # Many types for damaged headers, such as names that are no UTF-8 and numbers that are none.
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: expected a tar archive, got an error: {error}") from None
    # A damaged header ends the iteration as the zeros at the end of an archive do.
    file.seek(archive.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise UserError(
            f"{path}: expected a header of a member at byte {archive.offset:,}, got other bytes"
        )


def _tar_member(info: tarfile.TarInfo) -> TarMember:
    fault = 0
    if info.issym() or info.islnk():
        fault = LINK
    elif not info.isreg() or info.issparse():
        fault = SPECIAL
    blocks = -(-info.size // tarfile.BLOCKSIZE)
    member = Member(info.name, info.offset_data, info.size, info.size, fault=fault)
    return TarMember(member, info.offset, info.offset_data + blocks * tarfile.BLOCKSIZE)


class _BoundedReads:
    """A file that refuses to read more than headers have, whatever size they declare."""

    def __init__(self, file: BufferedIOBase):
        self._file = file
        self.allowance = _LARGEST_HEADER

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.allowance:
            raise tarfile.ReadError(f"headers of one member with {size:,} bytes more")
        self.allowance -= size
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
