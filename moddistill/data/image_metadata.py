"""Metadata of encoded images: the EXIF orientation is read, the rest is removed.

Text, colour profiles, previews and EXIF do not change pixels here, but decoders parse them. Damaged
metadata makes Pillow reject or warn about an image that viewers show, and compressed or repeated
metadata costs gigabytes or minutes.
"""

import re
import struct

# Header, palette, transparency, data, end.
_PNG_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}

# Frame headers, tables, the first scan, JFIF and Adobe (the last two define the colour space).
_JPEG_PIXEL_SEGMENTS = {*range(0xC0, 0xD0), *range(0xDA, 0xDE), 0xE0, 0xEE} - {0xC8}
_JPEG_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}
_JPEG_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff]")
_APP1, _START_OF_SCAN = 0xE1, 0xDA

_ORIENTATION, _SHORT = 0x0112, 3  # EXIF tag and type


def strip_png(data: bytes) -> tuple[bytes, bytes]:
    """Returns a PNG file without metadata, and its EXIF data or an empty string."""
    parts, exif, position = [data[:8]], b"", 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length  # length, kind, data, checksum
        if kind in _PNG_PIXEL_CHUNKS:
            parts.append(data[position:end])
        elif kind == b"eXIf":
            exif = data[position + 8 : end - 4]
        if kind == b"IEND":
            break
        position = end
    return b"".join(parts), exif


def strip_jpeg(data: bytes) -> tuple[bytes, bytes]:
    """Returns a JPEG file without metadata, and its EXIF data or an empty string.

    Raises:
      ValueError: a segment before the first scan is none that a decoder accepts.
    """
    parts, exif, position = [data[:2]], b"", 2
    while match := _JPEG_MARKER.search(data, position):  # skips bytes between segments
        marker, start = data[match.start() + 1], match.end()
        if marker == _START_OF_SCAN:
            return b"".join([*parts, data[match.start() :]]), exif
        if marker in _JPEG_WITHOUT_LENGTH:
            position = start
            continue
        position = start + int.from_bytes(data[start : start + 2], "big")
        if position < start + 2 or marker not in _JPEG_PIXEL_SEGMENTS | _JPEG_METADATA:
            raise ValueError(f"marker {marker:#x} of length {position - start}")
        if marker in _JPEG_PIXEL_SEGMENTS:
            parts.append(data[match.start() : position])
        elif marker == _APP1 and not exif and data.startswith(b"Exif\0\0", start + 2):
            exif = data[start + 2 : position]
    raise ValueError("no start of scan")


def orientation(exif: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 (as stored) where it is missing or damaged.

    Viewers show an image with damaged EXIF as it is stored.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if (tag, kind, values) == (_ORIENTATION, _SHORT, 1):
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
