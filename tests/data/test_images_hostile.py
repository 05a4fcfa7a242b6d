"""Damaged and hostile files of every format: each is an RGB image or an error of the image."""

import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import EmbeddedImage, preprocess, read_image
from moddistill.errors import UserError
from tests.data.encoded_images import chunk, exif, jpeg_segment, png, samples

RULES = ImageRules(pad_color=(122, 116, 104), max_pixels=2**16)
SECONDS = 2  # files of 1 kB take a millisecond
# The same examples in every run.
BOUNDED = settings(max_examples=100, derandomize=True, deadline=None)
EACH_FORMAT = pytest.mark.parametrize("name", samples())


def check(data):
    """Reads an image and checks what every outcome has in common; returns whether there is one."""
    start = time.thread_time()
    try:
        image = read_image(EmbeddedImage("a", data), RULES)
        assert image.mode == "RGB"
        assert 1 <= max(image.size) ** 2 <= RULES.max_pixels
        assert preprocess(image, 8, RULES.pad_color).shape == (8, 8, 3)
        return True
    except UserError as error:
        message = str(error)
        assert message.startswith("a: expected ")
        assert message.isprintable()
        assert len(message) < 500
        return False
    finally:
        assert time.thread_time() - start < SECONDS


def mutated(data, other, edits):
    """Applies edits (kind, position, length, value) to a file; positions are shares of it."""
    data = bytearray(data)
    for kind, position, length, value in edits:
        start = int(position * len(data))
        end = start + length
        match kind:
            case "flip" if data:
                data[min(start, len(data) - 1)] ^= 1 << value % 8
            case "set":
                data[start:end] = bytes([value]) * len(data[start:end])
            case "delete":
                del data[start:end]
            case "truncate":
                del data[start:]
            case "repeat":
                data[start:start] = data[start:end] * (value % 8)
            case "splice":
                middle = int(position * len(other))
                data[start:end] = other[middle : middle + 4 * length]
    return bytes(data)


def edits(kinds, max_position=1.0):
    """Returns a strategy of lists of edits."""
    position = st.floats(0, max_position)
    edit = st.tuples(st.sampled_from(kinds), position, st.integers(1, 32), st.integers(0, 255))
    return st.lists(edit, min_size=1, max_size=4)


@EACH_FORMAT
def test_the_samples_are_images(name):
    assert check(samples()[name])


@EACH_FORMAT
@BOUNDED
@given(edits(["flip", "set", "delete", "truncate", "repeat"]))
def test_damaged_files(name, changes):
    check(mutated(samples()[name], b"", changes))


@EACH_FORMAT
@BOUNDED
@given(edits(["flip", "set"], max_position=0.15))
def test_damaged_headers(name, changes):
    check(mutated(samples()[name], b"", changes))


@EACH_FORMAT
@BOUNDED
@given(st.sampled_from(sorted(samples())), edits(["splice"]))
def test_parts_of_other_files(name, other, changes):
    check(mutated(samples()[name], samples()[other], changes))


KINDS = [b"PLTE", b"tRNS", b"IDAT", b"IHDR", b"IEND", b"eXIf", b"acTL", b"fcTL", b"fdAT"]
CHUNK = st.builds(chunk, st.sampled_from(KINDS), st.binary(max_size=40))


@settings(BOUNDED, max_examples=600)
@given(
    depth=st.sampled_from([1, 2, 4, 8, 16]),
    color_type=st.sampled_from([0, 2, 3, 4, 6]),
    width=st.integers(0, 40),
    rows=st.lists(st.binary(max_size=40), max_size=5),
    chunks=st.lists(CHUNK, max_size=4),
)
def test_png_files_with_valid_checksums(depth, color_type, width, rows, chunks):
    check(png(rows, width, depth, color_type, *chunks))


@settings(BOUNDED, max_examples=600)
@given(st.integers(0xC0, 0xFF), st.binary(max_size=80), st.sampled_from(["jpeg", "jpeg cmyk"]))
def test_additional_jpeg_segments(marker, segment, name):
    data = samples()[name]
    check(data[:2] + jpeg_segment(marker, segment) + data[2:])


@settings(BOUNDED, max_examples=300)
@given(edits(["flip", "set", "truncate", "repeat"]))
def test_damaged_exif_never_rejects_an_image(changes):
    stored = samples()["jpeg grey"]
    damaged = mutated(exif(6) + exif(3, ">"), b"", changes)
    data = stored[:2] + jpeg_segment(0xE1, b"Exif\0\0" + damaged) + stored[2:]
    assert check(data)


@settings(BOUNDED, max_examples=300)
@given(
    st.sampled_from(["png", "gif", "bmp"]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
def test_any_size_in_a_header(name, width, height):
    data = bytearray(samples()[name])
    match name:
        case "png":
            data[8:33] = chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29])
        case "gif":
            data[6:10] = struct.pack("<HH", width % 2**16, height % 2**16)
        case "bmp":
            data[18:26] = struct.pack("<II", width, height)
    if check(bytes(data)):
        assert max(width, height) % 2**16 <= 256


@settings(BOUNDED, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes(data):
    check(data)
    for start in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBPVP8 "):
        check(start + data)


def test_neighbours_of_a_damaged_image_are_unchanged():
    """Decoders keep no state."""
    expected = {
        name: np.asarray(read_image(EmbeddedImage(name, data), RULES))
        for name, data in samples().items()
    }
    for name, data in samples().items():
        for size in range(0, len(data), 50):
            check(data[:size])
        pixels = np.asarray(read_image(EmbeddedImage(name, data), RULES))
        np.testing.assert_array_equal(pixels, expected[name])
