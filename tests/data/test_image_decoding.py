"""Encoded images as RGB, compared with arrays made by numpy."""

import io
import os
import struct

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from moddistill.data.image_decoding import ImageRules, decode
from moddistill.errors import UserError
from tests.data.encoded_images import (
    RED_GREEN,
    chunk,
    encoded,
    exif,
    png,
    random_pixels,
    rgb_png,
)

PAD = np.array([122, 116, 104])
RULES = ImageRules(pad_color=(122, 116, 104))


def pixels(data, rules=RULES):
    image = decode(data, rules, "a.png")
    assert image.mode == "RGB"
    return np.asarray(image)


def refusal(data, rules=RULES):
    """Returns the message that refuses an image."""
    with pytest.raises(UserError) as error:
        decode(data, rules, "a.png")
    return str(error.value)


def on_pad(colors, alpha):
    """Returns colours [..., 3] with `alpha` [...], 0 to 255, on the padding colour, unrounded."""
    alpha = np.asarray(alpha)[..., None] / 255
    return alpha * colors + (1 - alpha) * PAD


def grey(shades):
    """Returns shades [H, W] as colours [H, W, 3]."""
    return np.repeat(np.asarray(shades)[..., None], 3, axis=-1)


@pytest.mark.parametrize("name", ["PNG", "WEBP", "GIF", "BMP"])
def test_lossless_formats_are_read_exactly(name):
    expected = np.stack([random_pixels(7, 9) // 64 * 64] * 3, axis=-1)
    options = {"lossless": True} if name == "WEBP" else {}
    np.testing.assert_array_equal(
        pixels(encoded(Image.fromarray(expected), name, **options)), expected
    )


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_what_pillow_reads(progressive):
    data = encoded(Image.fromarray(random_pixels(20, 30, 3)), "JPEG", progressive=progressive)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(pixels(data), np.asarray(image))


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_read(name):
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue", "lime")]
    options = {"lossless": True} if name == "WEBP" else {}
    data = encoded(frames[0], name, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(pixels(data), np.broadcast_to([255, 0, 0], (3, 4, 3)))


def test_the_first_image_of_a_jpeg_file_with_several_is_read():
    frames = [Image.new("RGB", (16, 8), (70, 70, 70)), Image.new("RGB", (8, 8), (200, 200, 200))]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(data), np.full((8, 16, 3), 70))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encoded(Image.new("RGB", (4, 4)), "TIFF"), "TIFF"),
        (encoded(Image.new("RGB", (4, 4)), "EPS"), "EPS"),
        (encoded(Image.new("RGB", (4, 4)), "ICO"), "ICO"),
        (encoded(Image.new("RGB", (4, 4)), "PDF"), "PDF"),
        (b"\0\0\0\x20ftypavif\0\0\0\0", "AVIF or HEIF"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"<!DOCTYPE html><p>404", "HTML, XML or SVG"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"P6\n4 4\n255\n" + b" " * 48, r"bytes that begin with b'P6\n4 4\n255\n     '"),
        (b"RIFF\0\0\0\0WAVEfmt ", r"bytes that begin with b'RIFF\x00\x00\x00\x00WAVEfmt '"),
        (b"", "bytes that begin with b''"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_by_their_name(data, name):
    expected = "a.png: expected a readable image (JPEG, PNG, WebP, GIF, BMP), got "
    assert refusal(data) == expected + name


def test_an_eps_file_does_not_run_ghostscript(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/marker\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # where Pillow found it
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    data = encoded(Image.new("RGB", (4, 4)), "EPS")
    assert refusal(data).endswith("got EPS")
    assert not (tmp_path / "marker").exists()
    # Pillow runs it, and looks for its result.
    with Image.open(io.BytesIO(data)) as image, pytest.raises(OSError, match="cannot identify"):
        image.load()
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_png_of_any_depth(depth):
    shades = np.arange(16).reshape(2, 8) % 2**depth
    bits = (shades[..., None] >> np.arange(depth)[::-1]) & 1
    rows = [np.packbits(row).tobytes() for row in bits]
    expected = grey(shades * 255 // (2**depth - 1))
    np.testing.assert_array_equal(pixels(png(rows, 8, depth, 0)), expected)
    # One shade is transparent.
    key = chunk(b"tRNS", struct.pack(">H", 2**depth - 1))
    alpha = np.where(shades == 2**depth - 1, 0, 255)
    np.testing.assert_array_equal(pixels(png(rows, 8, depth, 0, key)), on_pad(expected, alpha))


@pytest.mark.parametrize("transparent", [None, 257, 65535])
def test_16_bit_grey_is_scaled_to_8_bits(transparent):
    """65535 / 257 is 255: white stays white, and `257 * byte` becomes `byte`."""
    shades = np.array([[0, 128, 256, 257], [30000, 32768, 65407, 65535]], ">u2")
    expected = grey([[0, 0, 1, 1], [117, 128, 255, 255]])
    rows = [row.tobytes() for row in shades]
    if transparent is None:
        np.testing.assert_array_equal(pixels(png(rows, 4, 16, 0)), expected)
    else:
        data = png(rows, 4, 16, 0, chunk(b"tRNS", struct.pack(">H", transparent)))
        alpha = np.where(shades == transparent, 0, 255)
        np.testing.assert_array_equal(pixels(data), on_pad(expected, alpha))


def test_16_bit_colours_are_within_one_of_their_8_bit_values():
    """Pillow drops the low byte."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 4)).astype(">u2")
    values[0, 0], values[0, 1], values[..., 3] = 0, 65535, 65535
    for color_type, channels in [(2, [0, 1, 2]), (6, [0, 1, 2, 3]), (4, [0, 3])]:
        data = png([row[:, channels].tobytes() for row in values], 7, 16, color_type)
        expected = values[..., :3] / 257 if color_type != 4 else grey(values[..., 0]) / 257
        result = pixels(data)
        np.testing.assert_allclose(result, expected, atol=1)
        np.testing.assert_array_equal(result[0, :2], [[0] * 3, [255] * 3])


def test_transparent_colour_of_rgb_png():
    pad = [122, 116, 104]
    key = chunk(b"tRNS", struct.pack(">3H", *RED_GREEN[0, 0]))
    np.testing.assert_array_equal(pixels(rgb_png(key)), [[pad, RED_GREEN[0, 1]]])
    wide = (RED_GREEN.astype(">u2") * 256 + 7).astype(">u2")
    key = chunk(b"tRNS", wide[0, 1].tobytes())
    data = png([wide.tobytes()], 2, 16, 2, key)
    np.testing.assert_array_equal(pixels(data), [[RED_GREEN[0, 0], pad]])


def every_alpha():
    """Returns 256 shades with every alpha: uint8 arrays [256, 256]."""
    shades, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    return shades, alpha


@pytest.mark.parametrize("name", ["PNG", "WEBP", "BMP"])
def test_colours_with_alpha_are_composited_on_the_padding_colour(name):
    shades, alpha = every_alpha()
    values = np.dstack([shades, 255 - shades, shades // 2, alpha])
    if name == "BMP":
        data = bmp_with_alpha(values)
    else:
        options = {"lossless": True, "exact": True} if name == "WEBP" else {}
        data = encoded(Image.fromarray(values), name, **options)
    np.testing.assert_allclose(pixels(data), on_pad(values[..., :3], alpha), atol=0.501)


def test_grey_with_alpha_is_composited_on_the_padding_colour():
    shades, alpha = every_alpha()
    image = Image.merge("LA", (Image.fromarray(shades), Image.fromarray(alpha)))
    expected = on_pad(grey(shades), alpha)
    np.testing.assert_allclose(pixels(encoded(image, "PNG")), expected, atol=0.501)


def bmp_with_alpha(values):
    """Returns a BMP file of RGBA values [H, W, 4]."""
    height, width = values.shape[:2]
    masks = (0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII4I", 108, width, -height, 1, 32, 3, 0, 0, 0, 0, 0, *masks)
    info = info.ljust(108, b"\0")
    data = values[..., [2, 1, 0, 3]].tobytes()
    return struct.pack("<2sIHHI", b"BM", 122 + len(data), 0, 0, 122) + info + data


PALETTE = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [10, 20, 30]], np.uint8)


@pytest.mark.parametrize(
    ("name", "transparency", "alpha"),
    [
        ("PNG", None, [255, 255, 255, 255]),
        ("GIF", None, [255, 255, 255, 255]),
        ("BMP", None, [255, 255, 255, 255]),
        ("PNG", 2, [255, 255, 0, 255]),
        ("GIF", 2, [255, 255, 0, 255]),
        ("PNG", b"\0\x80\xff", [0, 128, 255, 255]),
    ],
)
def test_palettes_and_their_transparency(name, transparency, alpha):
    indices = np.array([[0, 1, 2], [3, 2, 1]], np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(PALETTE.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    expected = on_pad(PALETTE[indices], np.array(alpha)[indices])
    result = pixels(encoded(image, name, **options))
    np.testing.assert_allclose(result, expected, atol=0.501)


@pytest.mark.parametrize("name", ["PNG", "GIF", "BMP"])
def test_1_bit_images_are_black_and_white(name):
    bits = random_pixels(5, 9) > 127
    expected = grey(np.where(bits, 255, 0))
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(bits), name)), expected)


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_of_jpeg_is_inverted_as_adobe_writes_it(adobe):
    """Ink c and black k on white reflect (255 - c)(255 - k) / 255; viewers assume inversion."""
    inks = np.array([[0, 0, 0, 0], [255, 0, 0, 0], [0, 200, 90, 0], [40, 0, 80, 120]], np.uint8)
    image = Image.fromarray(np.repeat(inks, 8, axis=0).reshape(4, 8, 4), "CMYK")
    data = encoded(image.resize((64, 32), 0), "JPEG", quality=100)
    marker = data.index(b"\xff\xee")
    if not adobe:
        data = data[:marker] + data[marker + 16 :]
    assert (b"Adobe" in data) == adobe
    expected = (255.0 - inks[:, :3]) * (255.0 - inks[:, 3:]) / 255
    for row, color in enumerate(expected):
        middle = pixels(data)[row * 8 + 4]
        np.testing.assert_allclose(middle, np.broadcast_to(color, (64, 3)), atol=2)


# EXIF orientation: where the stored first row and first column are shown.
SHOWN = {
    1: lambda array: array,
    2: lambda array: array[:, ::-1],
    3: lambda array: array[::-1, ::-1],
    4: lambda array: array[::-1],
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: array[::-1].swapaxes(0, 1),
    7: lambda array: array[::-1, ::-1].swapaxes(0, 1),
    8: lambda array: array[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("value", SHOWN)
@pytest.mark.parametrize("name", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation_is_applied_or_ignored(name, value):
    """The numpy forms are the definition of EXIF; `ImageOps.exif_transpose` agrees."""
    stored = random_pixels(5, 8, 3)
    options = {"lossless": True} if name == "WEBP" else {}
    data = encoded(Image.fromarray(stored), name, exif=b"Exif\0\0" + exif(value, ">"), **options)
    with Image.open(io.BytesIO(data)) as image:
        stored, viewed = np.asarray(image), np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(pixels(data), SHOWN[value](stored))
    np.testing.assert_array_equal(pixels(data), viewed)
    ignore = ImageRules(pad_color=(0, 0, 0), exif="ignore")
    np.testing.assert_array_equal(pixels(data, ignore), stored)


@pytest.mark.parametrize(
    "damage",
    [
        b"II*\0",
        b"no exif",
        exif(6)[:-7],
        exif(77),
        # A value beyond the end, about which Pillow warns.
        b"MM\0*" + struct.pack(">IHHHII", 8, 1, 0x010F, 2, 9999, 60000) + bytes(4),
    ],
)
@pytest.mark.parametrize("name", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_leaves_the_image_as_stored(name, damage):
    image = Image.fromarray(random_pixels(8, 16, 3))
    plain = encoded(image, name)
    data = encoded(image, name, exif=b"Exif\0\0" + damage)
    assert data != plain
    np.testing.assert_array_equal(pixels(data), pixels(plain))
