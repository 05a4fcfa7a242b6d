"""Image files to uint8 squares of one size: padded with the tower's mean colour, then resized.

Normalisation with the tower's mean and deviation is the model's part: bytes are a quarter of what
floats would send to the accelerator.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from moddistill.errors import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def mean_color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The colour that pads images for a tower with this mean, rounded down as LLaVA does."""
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


PAD_COLOR = mean_color(CLIP_MEAN)


def load_image(path: str) -> Image.Image:
    """The RGB image of a file.

    Raises:
      UserError: the file is there and is no readable image, or its pixels have no known range.
      OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        return _as_rgb(Image.open(io.BytesIO(data)))
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a readable image (no known format)") from None
    except Exception as error:  # each format's decoder has its own for broken bytes
        raise UserError(f"{path}: not a readable image ({error})") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """`image` in 8 bits a channel; Pillow would cut 16 bits off at 255 instead of scaling them."""
    if image.mode.startswith("I;16"):
        pixels = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(np.rint(pixels).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UserError(f"mode {image.mode} has no range; accepted: 8 or 16 bits a channel")
    return image.convert("RGB")


def pad_to_square(image: Image.Image, color: tuple[int, int, int] = PAD_COLOR) -> Image.Image:
    """`image` in the middle of a square as large as its longer side, filled with `color`."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def preprocess(
    image: Image.Image, size: int, pad_color: tuple[int, int, int] = PAD_COLOR
) -> np.ndarray:
    """uint8 [size, size, 3]: padded to a square, resized with bicubic interpolation."""
    square = pad_to_square(image, pad_color)
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
