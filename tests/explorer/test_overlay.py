"""Patches over the image, against the pixels that the vision encoder sees."""

import re

import numpy as np
import pytest
from PIL import Image

from moddistill.data.images import preprocess
from moddistill.explorer.marks import Mark
from moddistill.explorer.overlay import image_box, is_padding, overlay

GRID = 6


def bright_patches(pixels):
    """Patches that a bright region touches, from the square that the model sees."""
    size = len(pixels) // GRID
    means = pixels.reshape(GRID, size, GRID, size, 3).max((1, 3, 4))
    return {(int(row), int(column)) for row, column in np.argwhere(means > 200)}


@pytest.mark.parametrize("size", [(60, 60), (90, 40), (31, 77), (64, 63)])
@pytest.mark.parametrize("where", [(0, 0), (0.5, 0.5), (0.8, 0.3)])
def test_a_region_of_the_image_is_below_the_patches_that_see_it(size, where):
    width, height = size
    left, top = int(where[0] * width), int(where[1] * height)
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (left, top, left + 6, top + 6))
    seen = bright_patches(preprocess(image, 60))

    box = image_box(width, height, GRID)
    scale = GRID / max(size)
    x, y = box.x + (left + 3) * scale, box.y + (top + 3) * scale
    assert (int(y), int(x)) in seen
    # In no patch that is more than one away from the region.
    assert all(abs(row + 0.5 - y) < 1.5 and abs(column + 0.5 - x) < 1.5 for row, column in seen)


def test_padding_is_what_has_the_padding_colour_only():
    pixels = preprocess(Image.new("RGB", (90, 30), (255, 255, 255)), 60, (0, 0, 0))
    seen = bright_patches(pixels)
    box = image_box(90, 30, GRID)
    padding = {divmod(patch, GRID) for patch in range(GRID**2) if is_padding(patch, box, GRID)}
    assert padding == {(row, column) for row in range(GRID) for column in range(GRID)} - seen


def test_each_patch_has_its_expert_as_colour_number_and_words():
    image = Image.new("RGB", (40, 20))
    found = [Mark(f"expert-{i} color-{i} texture-0", "", str(i), f"<{i}>") for i in range(4)]
    svg = overlay(image, found, [False, False, True, False], "two & two")
    groups = re.findall(r'<g class="mark patch expert-(\d) .*?</g>', svg)
    assert groups == ["0", "1", "2", "3"]
    titles = re.findall(r"<text x=\"(\S+)\" y=\"(\S+)\">(\d)</text>", svg)
    assert titles == [
        ("0.5", "0.5", "0"),
        ("1.5", "0.5", "1"),
        ("0.5", "1.5", "2"),
        ("1.5", "1.5", "3"),
    ]
    assert "<title>row 2, column 1: &lt;2&gt;</title>" in svg
    assert svg.count('class="changed"') == 1 and 'aria-label="two &amp; two"' in svg
    assert 'x="0" y="0.5" width="2" height="1"' in svg  # the image in its square
