"""Encoded images to RGB: a fixed list of formats, a pixel limit, EXIF orientation, alpha.

Decoders are called by their class. `Image.open` has some 40 of them, one of which starts
Ghostscript, reads previews and other frames of JPEG files, and has a pixel limit of its own, which
is a global variable.
"""

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from moddistill.data.image_metadata import orientation, strip_jpeg, strip_png
from moddistill.errors import UserError, one_line

_DECODERS = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
}
# How files begin. Formats without a decoder are named when they are refused.
_SIGNATURES = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "JPEG": rb"\xff\xd8\xff",
        "PNG": rb"\x89PNG\r\n\x1a\n",
        "WebP": rb"RIFF....WEBP",
        "GIF": rb"GIF8[79]a",
        "BMP": rb"BM",
        "TIFF": rb"II[*+]\0|MM\0[*+]",
        "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
        "PDF": rb"%PDF",
        "AVIF or HEIF": rb"....ftyp(avi|hei|hev|mif|msf)",
        "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
        "ICO": rb"\0\0[\1\2]\0",
        "HTML, XML or SVG": rb"(\xef\xbb\xbf)?\s*<",
        "Git LFS pointer": rb"version https://git-lfs",
    }.items()
}

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Passes over all pixels that the scans of one progressive JPEG may cost, in multiples of
# `max_pixels`. Real files have about ten scans; 100 bytes make another one.
_MAX_SCANS = 100

# Pillow warns, for GIF, at a limit of its own. Here `ImageRules.max_pixels` decides. This filter is
# for the process, since `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageRules:
    """How images of a source are decoded.

    Attributes:
      max_pixels: largest image, in pixels after padding to a square. Decoding needs up to
        20 bytes a pixel, and padding 8.
      exif: "apply" turns images by their EXIF orientation, as viewers do; "ignore" does not.
      pad_color: colour, 0 to 255, below transparent pixels.
    """

    max_pixels: int = 2**26
    exif: Literal["apply", "ignore"] = "apply"
    pad_color: tuple[int, int, int]

    @property
    def max_bytes(self) -> int:
        """Size of the largest encoded image: 8 bytes a pixel and 1 MiB of metadata."""
        return 8 * self.max_pixels + 2**20


class ImageHeader(NamedTuple):
    """What an encoded image declares: format, and size in pixels before EXIF orientation."""

    format: str
    width: int
    height: int


def read_header(data: bytes, rules: ImageRules, origin: str) -> ImageHeader:
    """Returns the header of an image, whose pixels are not decoded; UserError as `decode`."""
    name = _format(data, origin)
    with _decoder_errors(rules, origin):
        image, _, _ = _open(data, name, rules, origin)
    return ImageHeader(name, *image.size)


def decode(data: bytes, rules: ImageRules, origin: str) -> Image.Image:
    """Decodes an image as RGB. `origin` is its name in messages.

    Raises:
      UserError: the data is no image of a known format, is damaged, or is too large.
    """
    name = _format(data, origin)
    with _decoder_errors(rules, origin):
        return _decode(data, name, rules, origin)


@contextlib.contextmanager
def _decoder_errors(rules: ImageRules, origin: str) -> Iterator[None]:
    """Raises UserError for everything that decoders raise."""
    try:
        yield
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Raised by GIF and WebP decoders when they are opened.
        expected = f"at most data.max_pixels {rules.max_pixels:,} pixels"
        raise UserError(f"{origin}: expected {expected}, got an error: {error}") from error
    except Exception as error:  # decoders raise many types, MemoryError among them
        reason = one_line(str(error) or type(error).__name__)
        raise UserError(f"{origin}: expected a readable image, got an error: {reason}") from error


def _decode(data: bytes, name: str, rules: ImageRules, origin: str) -> Image.Image:
    image, data, exif = _open(data, name, rules, origin)
    if name == "PNG":
        _scale_transparent_color(image, depth=data[24])
    method = _TRANSPOSE.get(orientation(exif)) if rules.exif == "apply" else None
    pixels = _as_rgb(image, rules.pad_color)
    return pixels if method is None else pixels.transpose(method)


def _open(data: bytes, name: str, rules: ImageRules, origin: str) -> tuple[ImageFile, bytes, bytes]:
    """Returns the image, which is not decoded, its data without metadata, and its EXIF block."""
    exif = b""
    if name == "JPEG":
        data, exif = strip_jpeg(data)
    elif name == "PNG":
        data, exif = strip_png(data)
    image = _DECODERS[name](io.BytesIO(data))
    _check_limits(image, data, rules.max_pixels, origin)
    return image, data, exif or image.info.get("exif", b"")


def _format(data: bytes, origin: str) -> str:
    name = next((name for name, pattern in _SIGNATURES.items() if pattern.match(data)), None)
    if name in _DECODERS:
        return name
    expected, start = ", ".join(_DECODERS), data[:16]
    got = name or f"bytes that begin with {start!r}"
    raise UserError(f"{origin}: expected a readable image ({expected}), got {got}")


def _check_limits(image: ImageFile, data: bytes, max_pixels: int, origin: str) -> None:
    """Raises UserError for an image, not yet decoded, that costs too much memory or time."""
    width, height = image.size
    pixels = max(width, height) ** 2
    if pixels > max_pixels:
        raise UserError(
            f"{origin}: expected at most data.max_pixels {max_pixels:,} pixels after padding to a "
            f"square, got {pixels:,} ({width} x {height})"
        )
    scans = data.count(b"\xff\xda") if "progressive" in image.info else 1
    if scans * width * height > _MAX_SCANS * max_pixels:
        raise UserError(f"{origin}: expected a JPEG of about 10 scans, got {scans:,}")


def _as_rgb(image: ImageFile, pad_color: tuple[int, int, int]) -> Image.Image:
    """Decodes to 8 bits per channel, with transparent pixels on `pad_color`."""
    image.load()
    if image.mode == "I;16":
        image = _as_8_bits(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    opaque = Image.new("RGB", image.size, pad_color)
    image = image.convert("RGBA")
    opaque.paste(image, mask=image)
    return opaque


def _as_8_bits(image: Image.Image) -> Image.Image:
    """Converts 16-bit grey to L, or to LA if one shade is transparent."""
    # Pillow's own conversion clips 16-bit values at 255. 65535 / 257 is 255.
    shades = np.asarray(image)
    scaled = Image.fromarray(np.rint(shades.astype(np.float32) / 257).astype(np.uint8))
    if "transparency" in image.info:
        opaque = shades != image.info["transparency"]
        scaled.putalpha(Image.fromarray(opaque))
    return scaled


def _scale_transparent_color(image: ImageFile, depth: int) -> None:
    """Scales the transparent colour of a PNG, in bits of the file, to the 8 bits of its pixels."""
    color = image.info.get("transparency")
    if image.mode in ("1", "L") and color is not None:
        # The low bits count. Some releases of Pillow have scaled 1 bit already.
        image.info["transparency"] = color % 2**depth * 255 // (2**depth - 1)
    elif image.mode == "RGB" and color is not None and depth == 16:
        # Pillow keeps the high bytes of 16-bit colours, so colours that differ less are one.
        image.info["transparency"] = tuple(channel >> 8 for channel in color)
