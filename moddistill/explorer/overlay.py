"""Marks of patches over the image that they are patches of.

A vision encoder sees a square: the image in the middle of a square of its longer side, which is
then resized (`data.images.preprocess`). Patches are shown on that square, at the size of the image.
"""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from moddistill.explorer.data_uris import data_uri
from moddistill.explorer.marks import Mark
from moddistill.explorer.markup import html_text

_SHOWN = 512  # pixels of the longer side
_MOST_LABELS = 16  # patches of a side that have room for one
# Two textures over a colour, in units of a patch.
_DEFINITIONS = """<defs>
<pattern id="texture-1" width=".25" height=".25" patternUnits="userSpaceOnUse"
 patternTransform="rotate(45)"><path d="M0 0V.25" stroke="#000" stroke-width=".08"/></pattern>
<pattern id="texture-2" width=".25" height=".25" patternUnits="userSpaceOnUse">
<circle cx=".12" cy=".12" r=".06"/></pattern></defs>"""


class Box(NamedTuple):
    """A rectangle in units of a patch, from the top left of the square."""

    x: float
    y: float
    width: float
    height: float


def image_box(width: int, height: int, grid: int) -> Box:
    """Returns where an image of these pixels is in a square of `grid` by `grid` patches."""
    side = max(width, height)
    # In whole pixels, as padding is.
    left, top = (side - width) // 2, (side - height) // 2
    return Box(*(grid * length / side for length in (left, top, width, height)))


def is_padding(patch: int, box: Box, grid: int) -> bool:
    """Returns True if no part of the image is in a patch, of which the first is 0."""
    row, column = divmod(patch, grid)
    return not (
        box.x < column + 1
        and column < box.x + box.width
        and box.y < row + 1
        and row < box.y + box.height
    )


def overlay(
    image: Image.Image, patch_marks: Sequence[Mark], changed: Sequence[bool], alt: str
) -> str:
    """Returns an SVG of the square with its patches, row by row.

    Args:
      patch_marks: of all patches of the image, as many as a square has.
      changed: patches that get an outline.
      alt: what the image shows, in words.
    """
    grid = round(len(patch_marks) ** 0.5)
    box = image_box(*image.size, grid)
    patches = "".join(
        _patch(number, mark, outlined, box, grid)
        for number, (mark, outlined) in enumerate(zip(patch_marks, changed, strict=True))
    )
    return (
        f'<svg class="overlay" viewBox="0 0 {grid} {grid}" role="img" '
        f'aria-label="{html_text(alt)}">'
        f'{_DEFINITIONS}<rect class="padding" width="{grid}" height="{grid}"/>'
        f'<image href="{data_uri(image, _SHOWN)}" x="{box.x:.5g}" y="{box.y:.5g}" '
        f'width="{box.width:.5g}" height="{box.height:.5g}" preserveAspectRatio="none"/>'
        f"{patches}</svg>"
    )


def _patch(number: int, mark: Mark, outlined: bool, box: Box, grid: int) -> str:
    row, column = divmod(number, grid)
    corner = f'x="{column}" y="{row}" width="1" height="1"'
    place = f"row {row + 1}, column {column + 1}"
    place += ", padding" if is_padding(number, box, grid) else ""
    style = f' style="fill:{mark.color}"' if mark.color else ""
    shapes = f'<rect class="fill" {corner}{style}/>'
    if not mark.color:
        shapes += f'<rect class="texture" {corner}/>'
    if grid <= _MOST_LABELS:
        shapes += f'<text x="{column + 0.5}" y="{row + 0.5}">{mark.label}</text>'
    if outlined:
        inner = f'x="{column + 0.06}" y="{row + 0.06}" width=".88" height=".88"'
        shapes += f'<rect class="changed" {inner}/>'
    title = f"<title>{place}: {html_text(mark.title)}</title>"
    return f'<g class="mark patch {mark.classes}">{shapes}{title}</g>'
