"""Images in the text of the page."""

import base64
import io

from PIL import Image


def data_uri(image: Image.Image, longest: int) -> str:
    """Returns an RGB image as a `data:` URI, scaled down to a longer side of `longest` pixels."""
    image = image.copy()
    image.thumbnail((longest, longest))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
