"""Images of records as uint8 squares: padded with the mean colour of the vision encoder, resized.

The model normalises by mean and standard deviation, since uint8 needs a quarter of the transfer of
float32.
"""

import numpy as np
from PIL import Image

from moddistill.data.image_decoding import ImageRules, decode
from moddistill.data.image_files import EmbeddedImage, ImageFile, read_bytes, read_file
from moddistill.errors import one_line

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def mean_color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Returns the padding colour (0 to 255) for a normalisation mean, rounded down as in LLaVA."""
    red, green, blue = (int(channel * 255) for channel in mean)
    return red, green, blue


PAD_COLOR = mean_color(CLIP_MEAN)


def read_image(image: ImageFile | EmbeddedImage, rules: ImageRules) -> Image.Image:
    """Returns the image of a record as RGB.

    Safe against records that are wrong or hostile, and in threads. A file is opened only below its
    root.

    Raises:
      UserError: the image cannot be read, is no image of a known format, is damaged or too large.
    """
    return decode(read_bytes(image, rules.max_bytes), rules, str(image))


def load_image(path: str, rules: ImageRules | None = None) -> Image.Image:
    """Returns the image file at any path as RGB; for paths that the user typed.

    Args:
      path: of the file.
      rules: by default those of `ImageRules`, with the padding colour of CLIP.

    Raises:
      UserError: the file cannot be read, is no image of a known format, is damaged or too large.
    """
    rules = rules or ImageRules(pad_color=PAD_COLOR)
    origin = one_line(path)
    return decode(read_file(path, rules.max_bytes, origin), rules, origin)


def pad_to_square(image: Image.Image, color: tuple[int, int, int] = PAD_COLOR) -> Image.Image:
    """Centres the image in a square of its longer side, filled with `color`."""
    side = max(image.size)
    return _pad(image, (side, side), color)


def preprocess(
    image: Image.Image, size: int, pad_color: tuple[int, int, int] = PAD_COLOR
) -> np.ndarray:
    """Pads to a square and resizes bicubically; returns uint8 [size, size, 3]."""
    side = max(image.size)
    if image.width == side:
        # Pillow resizes rows, then columns. The rows above and below the image have one colour, so
        # resizing only those of the image before padding gives the same bits in less time.
        image = image.resize((size, image.height), Image.Resampling.BICUBIC)
        square = _pad(image, (size, side), pad_color)
    else:
        square = _pad(image, (side, side), pad_color)
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def _pad(image: Image.Image, size: tuple[int, int], color: tuple[int, int, int]) -> Image.Image:
    if image.size == size:
        return image
    padded = Image.new("RGB", size, color)
    padded.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return padded
