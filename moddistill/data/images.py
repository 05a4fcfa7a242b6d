"""Image files to uint8 squares: padded with the mean colour of the vision encoder, resized.

The model normalises by mean and standard deviation, since uint8 needs a quarter of the transfer of
float32.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from moddistill.errors import UserError, invalid

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def mean_color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Returns the padding colour (0 to 255) for a normalisation mean, rounded down as in LLaVA."""
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


PAD_COLOR = mean_color(CLIP_MEAN)


def load_image(path: str) -> Image.Image:
    """Loads an image file as RGB.

    Raises:
      UserError: the file is not a readable image, or its pixels have no known range.
      OSError: the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        return _as_rgb(Image.open(io.BytesIO(data)))
    except UnidentifiedImageError:
        raise UserError(f"{path}: expected a readable image, got none of a known format") from None
    except Exception as error:  # decoders raise many types for corrupt bytes
        raise UserError(f"{path}: expected a readable image, got an error: {error}") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8 bits per channel."""
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16-bit values at 255. 65535 / 257 is 255.
        pixels = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(np.rint(pixels).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise invalid("pixel mode", image.mode, "8 or 16 bits per channel")
    return image.convert("RGB")


def pad_to_square(image: Image.Image, color: tuple[int, int, int] = PAD_COLOR) -> Image.Image:
    """Centres the image in a square of its longer side, filled with `color`."""
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
    """Pads to a square and resizes bicubically; returns uint8 [size, size, 3]."""
    square = pad_to_square(image, pad_color)
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
