import pytest

from moddistill.inference.prompts import Prompt


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
