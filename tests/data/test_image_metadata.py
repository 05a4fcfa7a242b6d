"""What is removed from encoded images, and the orientation that is read."""

import io
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moddistill.data.image_metadata import orientation, strip_jpeg, strip_png
from tests.data.encoded_images import chunk, encoded, exif, jpeg_segment, rgb_png, samples

BOUNDED = settings(max_examples=200, derandomize=True, deadline=1000)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
def test_orientation_is_read_in_both_byte_orders(order, prefix):
    for value in range(1, 9):
        assert orientation(prefix + exif(value, order)) == value


def test_orientation_is_found_among_other_entries():
    data = Image.Exif()
    data.update({0x010F: "maker", 0x0110: "model", 0x0112: 8, 0x0132: "2020:01:01 00:00:00"})
    data.get_ifd(0x8825)[1] = "N"
    assert orientation(data.tobytes()) == 8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Exif\0\0",
        b"II*\0",
        b"no exif data",
        exif(6)[:-7],  # ends within the value
        exif(6)[:12],
        exif(0),
        exif(9),
        exif(65535),
        exif(6, kind=4),
        exif(6, kind=2),
        exif(6, count=2),
        b"XX" + exif(6)[2:],
        exif(6).replace(b"\x12\x01", b"\x13\x01"),
        b"II*\0" + struct.pack("<IH", 8, 65535),
        b"II*\0" + struct.pack("<I", 2**32 - 1),
    ],
)
def test_missing_and_damaged_orientation_is_that_of_the_stored_pixels(data):
    assert orientation(data) == 1


@BOUNDED
@given(st.binary(max_size=60), st.integers(0, 30))
def test_any_bytes_have_an_orientation(data, position):
    valid = exif(6)
    assert 1 <= orientation(data) <= 8
    assert 1 <= orientation(valid[:position] + data) <= 8
    assert 1 <= orientation(valid[:4] + data) <= 8


def test_png_keeps_what_pixels_depend_on():
    text = [
        chunk(b"tEXt", b"a\0b"),
        chunk(b"iCCP", b"a\0\0b"),
        chunk(b"acTL", b""),
        chunk(b"zzZz", b""),
    ]
    needed = [chunk(b"PLTE", bytes(6)), chunk(b"tRNS", bytes(6))]
    data = rgb_png(*text, *needed, chunk(b"eXIf", exif(6)), *text)
    assert strip_png(data) == (rgb_png(*needed), exif(6))
    trailing = chunk(b"IDAT", b"") + chunk(b"eXIf", exif(3))
    assert strip_png(data + trailing) == (rgb_png(*needed), exif(6))
    # EXIF may follow the pixels.
    end = chunk(b"IEND", b"")
    late = rgb_png().removesuffix(end) + chunk(b"eXIf", exif(3)) + end
    assert strip_png(late) == (rgb_png(), exif(3))


def test_jpeg_keeps_what_pixels_depend_on():
    plain = encoded(Image.new("CMYK", (8, 8)), "JPEG")
    metadata = [jpeg_segment(marker, b"data") for marker in [*range(0xE1, 0xEE), 0xEF, 0xFE]]
    segments = b"".join([*metadata, jpeg_segment(0xE1, b"Exif\0\0" + exif(6)), *metadata])
    second = jpeg_segment(0xE1, b"Exif\0\0" + exif(3))
    assert b"Adobe" in plain
    assert strip_jpeg(plain) == (plain, b"")
    assert strip_jpeg(plain[:2] + segments + second + plain[2:]) == (plain, b"Exif\0\0" + exif(6))
    # Decoders skip fill bytes, restart markers and other bytes between segments too.
    filled = plain[:2] + b"\xff\xff" + segments + b"\0any\xff\0\xff\xd0\xff" + plain[2:]
    assert strip_jpeg(filled) == (plain, b"Exif\0\0" + exif(6))


@pytest.mark.parametrize(
    "segment", [b"\xff\xe1\0\1", b"\xff\xd8", b"\xff\xd9", b"\xff\xf0\0\4ab", b"\xff\xc8\0\2"]
)
def test_jpeg_segments_that_no_decoder_accepts_are_an_error(segment):
    plain = samples()["jpeg grey"]
    with pytest.raises(ValueError, match=r"^marker 0x[0-9a-f]{2} of length"):
        strip_jpeg(plain[:2] + segment + plain[2:])


def test_jpeg_without_a_scan_is_an_error():
    plain = samples()["jpeg grey"]
    for size in (3, 20, plain.index(b"\xff\xda"), plain.index(b"\xff\xda") + 1):
        with pytest.raises(ValueError, match="no start of scan"):
            strip_jpeg(plain[:size])


def test_long_runs_of_fill_bytes_and_segments_take_linear_time():
    """At 10 MB, quadratic time would be hours."""
    plain = samples()["jpeg grey"]
    fill = b"\xff" * 10**7 + b"\0" * 10**7 + b"\xff\0" * 10**6
    text = jpeg_segment(0xE1, b"Exif\0\0" + bytes(10)) * 10**5
    assert strip_jpeg(plain[:2] + fill + text + fill + plain[2:])[0] == plain
    assert strip_png(rgb_png(chunk(b"tEXt", b"") * 10**5))[0] == rgb_png()


@pytest.mark.parametrize("name", [name for name in samples() if name.startswith(("jpeg", "png"))])
def test_pixels_do_not_depend_on_what_is_removed(name):
    data = samples()[name]
    strip = strip_jpeg if name.startswith("jpeg") else strip_png
    with Image.open(io.BytesIO(data)) as image, Image.open(io.BytesIO(strip(data)[0])) as stripped:
        assert (stripped.mode, stripped.tobytes()) == (image.mode, image.tobytes())
