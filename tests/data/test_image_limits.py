"""Images that cost too much memory or time are refused; every error is one of the image."""

import io
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from moddistill.data import image_decoding
from moddistill.data.image_decoding import ImageRules, decode
from moddistill.errors import UserError
from tests.data.encoded_images import (
    RED_GREEN,
    chunk,
    encoded,
    exif,
    jpeg_segment,
    rgb_png,
    samples,
)

RULES = ImageRules(pad_color=(122, 116, 104))


def pixels(data, rules=RULES):
    return np.asarray(decode(data, rules, "a.png"))


def refusal(data, rules=RULES):
    """Returns the message that refuses an image."""
    with pytest.raises(UserError) as error:
        decode(data, rules, "a.png")
    return str(error.value)


def with_size(name, width, height):
    """Returns a small file whose header has another size."""
    data = bytearray(samples()[name])
    if name == "webp":
        data = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP"))
    match name:
        case "png":
            header = struct.pack(">II", width, height) + data[24:29]
            data[8:33] = chunk(b"IHDR", header)
        case "gif" | "gif animated":
            data[6:10] = struct.pack("<HH", width, height)
        case "bmp":
            data[18:26] = struct.pack("<ii", width, height)
        case "jpeg":
            start = data.index(b"\xff\xc0")
            data[start + 5 : start + 9] = struct.pack(">HH", height, width)
        case "webp":  # 14 bits a side
            start = data.index(b"\x9d\x01\x2a")
            data[start + 3 : start + 7] = struct.pack("<HH", width, height)
        case "webp animated":  # 24 bits a side, less one
            data[24:30] = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "width", "height"),
    [
        ("png", 1, 65_000),
        ("png", 10_000, 10_000),
        ("png", 2**31 - 1, 2**31 - 1),
        ("gif", 65_000, 12),
        ("gif", 65_535, 65_535),
        ("gif animated", 65_535, 65_535),
        ("bmp", 1, 65_000),
        ("bmp", 2**31 - 1, 2**31 - 1),
        ("jpeg", 1, 65_000),
        ("jpeg", 65_500, 65_500),
        ("webp", 10_000, 10_000),
        ("webp", 16_383, 16_383),
        ("webp animated", 10_000, 10_000),
    ],
)
def test_an_image_is_refused_by_its_header(name, width, height, monkeypatch):
    data = with_size(name, width, height)
    monkeypatch.setattr(Image.core, "new", None)  # no memory for pixels
    pixels = max(width, height) ** 2
    message = refusal(data)
    if "DOS" in message:  # WebP, beyond Pillow's own limit
        assert message.startswith("a.png: expected at most data.max_pixels 67,108,864 pixels, got")
        assert str(width * height) in message
    else:
        assert message == (
            "a.png: expected at most data.max_pixels 67,108,864 pixels after padding to a square, "
            f"got {pixels:,} ({width} x {height})"
        )


def test_the_pixel_limit_is_that_of_the_padded_square():
    rules = ImageRules(pad_color=(0, 0, 0), max_pixels=64)
    for size in [(8, 8), (8, 1), (1, 8)]:
        assert decode(encoded(Image.new("RGB", size), "PNG"), rules, "a").size == size
    for size in [(9, 1), (1, 9), (9, 9)]:
        expected = f"at most data.max_pixels 64 pixels after .*, got 81 \\({size[0]} x {size[1]}\\)"
        with pytest.raises(UserError, match=expected):
            decode(encoded(Image.new("RGB", size), "PNG"), rules, "a")


@pytest.mark.parametrize("name", ["png", "gif", "bmp", "jpeg", "webp"])
@pytest.mark.parametrize("size", [(0, 0), (0, 12), (17, 0)])
def test_images_without_pixels_are_refused(name, size):
    if name == "gif":
        # Without the frame, whose size would be used.
        data = with_size(name, *size)
        frame = data.index(b",", 13 + 3 * 16)
        data = data[: frame + 5] + struct.pack("<HH", *size) + data[frame + 9 :]
    else:
        data = with_size(name, *size)
    assert refusal(data).startswith("a.png: expected a readable image, got an error: ")


def test_a_gif_frame_beyond_its_screen_is_refused_without_a_warning_on_stderr():
    """Pillow warns beyond 89 million pixels."""
    data = bytearray(with_size("gif", 1, 1))
    frame = data.index(b",", 13 + 3 * 16)
    data[frame + 5 : frame + 9] = struct.pack("<HH", 10_000, 10_000)
    assert "data.max_pixels" in refusal(bytes(data))
    program = f"""
from moddistill.data.image_decoding import ImageRules, decode
decode({bytes(data)!r}, ImageRules(pad_color=(0, 0, 0)), "a.gif")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    *_, last = run.stderr.splitlines()
    assert "got 100,000,000 (10000 x 10000)" in last
    assert "DecompressionBombWarning" not in run.stderr


def test_compressed_metadata_of_png_is_not_expanded():
    bomb = zlib.compress(bytes(10**8), 9)
    bombs = [
        chunk(b"zTXt", b"a\0\0" + bomb),
        chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"a\0\0" + bomb),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**6), 9)) * 1000,
    ]
    tracemalloc.start()
    start = time.thread_time()
    for data in bombs:
        np.testing.assert_array_equal(pixels(rgb_png(data)), RED_GREEN)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    assert time.thread_time() - start < 2


def test_repeated_exif_segments_take_linear_time():
    data = samples()["jpeg"]
    segments = jpeg_segment(0xE1, b"Exif\0\0" + exif(1) + bytes(100)) * 20_000
    start = time.thread_time()
    stored = pixels(data, ImageRules(pad_color=(0, 0, 0), exif="ignore"))
    np.testing.assert_array_equal(pixels(data[:2] + segments + data[2:]), stored)
    assert time.thread_time() - start < 2


def test_a_progressive_jpeg_of_very_many_scans_is_refused():
    """Each scan of 100 bytes is a pass over all pixels."""
    data = encoded(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    head, scan = data[:start], data[start:-2]
    rules = ImageRules(pad_color=(0, 0, 0), max_pixels=10**6)
    assert decode(head + scan * 50 + b"\xff\xd9", rules, "a").size == (1000, 1000)
    message = refusal(head + scan * 5000 + b"\xff\xd9", rules)
    assert message == "a.png: expected a JPEG of about 10 scans, got 5,009"


@pytest.mark.parametrize(
    "name", sorted(samples().keys() - {"gif animated"})
)  # its first frame is short
def test_a_truncated_file_is_an_error_that_names_it(name):
    data = samples()[name]
    for size in (3, 10, 20, 40, len(data) // 2):
        assert refusal(data[:size]).startswith("a.png: expected a readable image")


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("deep"), OSError("x"), KeyError("k"), UserWarning("w")]
)
def test_any_exception_of_a_decoder_is_an_error_of_the_image(error, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setitem(image_decoding._DECODERS, "PNG", fail)
    reason = str(error) or type(error).__name__
    assert refusal(rgb_png()) == f"a.png: expected a readable image, got an error: {reason}"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_request_to_stop_is_no_error_of_the_image(error, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setitem(image_decoding._DECODERS, "PNG", fail)
    with pytest.raises(error):
        decode(rgb_png(), RULES, "a.png")


def test_messages_of_decoders_are_one_line_of_bounded_length(monkeypatch):
    def fail(_):
        raise ValueError("first\nsecond\x1b[2J\0" + "x" * 10**6)

    monkeypatch.setitem(image_decoding._DECODERS, "PNG", fail)
    message = refusal(rgb_png())
    assert r"got an error: first\nsecond\x1b[2J\x00xxx" in message
    assert len(message) < 300


def test_pillow_is_not_changed_for_other_code():
    assert Image.MAX_IMAGE_PIXELS == 2**30 // 4 // 3
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(with_size("png", 20_000, 20_000)))
