import dataclasses

import numpy as np
import pytest
from PIL import Image

from moddistill.data.image_decoding import ImageHeader, ImageRules, decode, read_header
from moddistill.errors import UserError
from tests.data.encoded_images import (
    encoded,
    exif,
    random_pixels,
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


@pytest.mark.parametrize(
    ("kind", "format"), [("PNG", "PNG"), ("JPEG", "JPEG"), ("WEBP", "WebP"), ("GIF", "GIF")]
)
def test_a_header_has_format_and_size_before_orientation(kind, format):
    image = Image.new("RGB", (7, 9))
    options = {"exif": exif(6)} if kind == "JPEG" else {}
    data = encoded(image, kind, **options)
    assert read_header(data, RULES, "a.png") == ImageHeader(format, 7, 9)


def test_a_header_is_read_of_an_image_whose_pixels_are_damaged():
    data = encoded(Image.fromarray(random_pixels(50, 50)), "PNG")
    damaged = data[: len(data) // 2]
    assert read_header(damaged, RULES, "a.png") == ImageHeader("PNG", 50, 50)
    assert "expected a readable image" in refusal(damaged)


@pytest.mark.parametrize("data", [b"", b"text", b"%!PS-Adobe", b"\xff\xd8\xff\xe0"])
def test_a_header_of_no_image_is_refused(data):
    with pytest.raises(UserError, match="expected a readable image"):
        read_header(data, RULES, "a.png")


def test_a_header_above_the_limit_of_pixels_is_refused():
    data = encoded(Image.new("RGB", (1, 100)), "PNG")
    with pytest.raises(UserError, match=r"at most data.max_pixels 9,999 pixels"):
        read_header(data, dataclasses.replace(RULES, max_pixels=9_999), "a.png")
