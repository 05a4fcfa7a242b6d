import numpy as np
import pytest
from PIL import Image

from moddistill.inference.prompts import Prompt


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """`image(seed)`: the path of a small random image."""
    folder = tmp_path_factory.mktemp("images")

    def write(seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 28, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
        return str(folder / f"{seed}.png")

    return write


@pytest.fixture(scope="session")
def prompts(image):
    """Nine prompts of different lengths with 0, 1 or 2 images, some with earlier turns."""
    questions = ["what is it?", "is it red, green or blue?", "say what colour that is, in one word"]
    images = (image(0), image(1))
    return [
        Prompt("<image>\n" * count + question, images[:count], (("hello", "yes"),) * (count == 1))
        for question in questions
        for count in range(3)
    ]
