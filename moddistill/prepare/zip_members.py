"""Lists the members of zip archives."""

import os
import stat
import struct
import zipfile
from collections.abc import Iterator

from moddistill.errors import UserError
from moddistill.prepare.archives import COMPRESSION, ENCRYPTED, LINK, SPECIAL, TRUNCATED, Member

_ENCRYPTED_BIT = 1


def list_zip(path: str) -> Iterator[Member]:
    """Yields the members of a zip archive that are no folders.

    Raises:
      UserError: the file is no zip archive, or its directory is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # Many types for a damaged directory.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(f"{path}: expected a zip archive, got an error: {error}") from None
    end = os.path.getsize(path)
    if any(info.header_offset < 0 for info in infos):
        raise UserError(f"{path}: expected an entire zip archive, got one without its beginning")
    for info in infos:
        if not info.filename.endswith("/"):
            yield Member(
                name=info.filename,
                offset=info.header_offset,
                stored=info.compress_size,
                size=info.file_size,
                crc=info.CRC,
                is_deflated=info.compress_type == zipfile.ZIP_DEFLATED,
                fault=_fault(info, end),
            )


def _fault(info: zipfile.ZipInfo, end: int) -> int:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 unless written on Unix
    if kind == stat.S_IFLNK:
        return LINK
    if kind not in (0, stat.S_IFREG):
        return SPECIAL
    if info.flag_bits & _ENCRYPTED_BIT:
        return ENCRYPTED
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return COMPRESSION
    return TRUNCATED if info.header_offset + info.compress_size > end else 0
