"""Encoded images for tests: PNG files of any bit depth chunk by chunk, EXIF, one file a format."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

RED_GREEN = np.array([[[250, 10, 20], [30, 240, 50]]], np.uint8)  # [1, 2, 3]


def chunk(kind: bytes, data: bytes) -> bytes:
    """Returns a PNG chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: list[bytes], width: int, depth: int, color_type: int, *chunks: bytes) -> bytes:
    """Returns a PNG file of packed rows; `chunks` are between its header and its data."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))  # 0: no filter
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rgb_png(*chunks: bytes) -> bytes:
    """Returns the PNG file of `RED_GREEN`."""
    return png([RED_GREEN.tobytes()], 2, 8, 2, *chunks)


def encoded(image: Image.Image, name: str, **options) -> bytes:
    """Returns the bytes that Pillow writes in the format `name`."""
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def exif(value: int, order: str = "<", kind: int = 3, count: int = 1) -> bytes:
    """Returns EXIF data whose only entry is an orientation."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, kind, count, value, 0, 0)


def jpeg_segment(marker: int, data: bytes) -> bytes:
    """Returns a JPEG segment."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def random_pixels(*shape: int) -> np.ndarray:
    """Returns uint8 noise, the same for every call."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@functools.cache
def samples() -> dict[str, bytes]:
    """Returns small valid files of every format, in the modes that decoders treat differently."""
    rgb = Image.fromarray(random_pixels(12, 17, 3))
    rgba = Image.fromarray(random_pixels(12, 17, 4))
    palette = rgb.quantize(16)
    grey16 = random_pixels(12, 34)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": encoded(rgb, "JPEG", exif=turned, comment=b"text"),
        "jpeg progressive": encoded(rgb, "JPEG", progressive=True),
        "jpeg grey": encoded(rgb.convert("L"), "JPEG"),
        "jpeg cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "png": encoded(rgb, "PNG", exif=turned),
        "png alpha": encoded(rgba, "PNG"),
        "png palette": encoded(palette, "PNG", transparency=b"\0\x80\xff"),
        "png 1 bit": encoded(rgb.convert("1"), "PNG"),
        "png grey 16": png([row.tobytes() for row in grey16], 17, 16, 0, chunk(b"tRNS", b"\1\2")),
        "webp": encoded(rgb, "WEBP", exif=turned),
        "webp lossless": encoded(rgba, "WEBP", lossless=True),
        "webp animated": encoded(rgb, "WEBP", save_all=True, append_images=[rgba]),
        "gif": encoded(palette, "GIF", transparency=3, comment=b"text"),
        "gif animated": encoded(palette, "GIF", save_all=True, append_images=[rgb], disposal=2),
        "bmp": encoded(rgb, "BMP"),
        "bmp palette": encoded(palette, "BMP"),
    }
