import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor

from moddistill.data.image_decoding import ImageRules
from moddistill.data.image_files import EmbeddedImage, ImageFile
from moddistill.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    PAD_COLOR,
    load_image,
    mean_color,
    pad_to_square,
    preprocess,
    read_image,
)
from moddistill.errors import UserError
from moddistill.storage.model_folder import preprocessor_config
from tests.data.encoded_images import samples


def random_image(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and standard deviation
NORMALISATIONS = pytest.mark.parametrize(
    ("mean", "std"), [(CLIP_MEAN, CLIP_STD), (HALF, HALF)], ids=["CLIP", "SigLIP"]
)


@pytest.mark.parametrize(
    ("mean", "color"),
    [(CLIP_MEAN, (122, 116, 104)), (HALF, (127, 127, 127)), ((0.0, 0.999, 1.0), (0, 254, 255))],
)
@pytest.mark.parametrize(("width", "height", "left", "top"), [(4, 9, 2, 0), (9, 4, 0, 2)])
def test_padding_centres_the_image_on_the_floored_mean_colour(
    width, height, left, top, mean, color
):
    assert mean_color(mean) == color
    image = random_image(width, height)
    expected = np.empty((9, 9, 3), np.uint8)
    expected[:] = color
    expected[top : top + height, left : left + width] = np.asarray(image)
    np.testing.assert_array_equal(np.asarray(pad_to_square(image, color)), expected)
    np.testing.assert_array_equal(preprocess(image, 9, color), expected)


def test_default_padding_colour_is_that_of_clip():
    image = random_image(4, 9)
    expected = preprocess(image, 9, mean_color(CLIP_MEAN))
    np.testing.assert_array_equal(preprocess(image, 9), expected)


def test_square_image_of_the_right_size_is_unchanged():
    image = random_image(6, 6)
    np.testing.assert_array_equal(preprocess(image, 6), np.asarray(image))


def normalise(pixels, mean=CLIP_MEAN, std=CLIP_STD):
    """Returns uint8 [H, W, 3] as the normalised [3, H, W] that a model gets."""
    return ((pixels / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(50, 30), (31, 64), (24, 24)])
def test_pixels_equal_those_of_the_clip_processor_on_padded_images(size):
    shape = {"height": 24, "width": 24}
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=shape)
    image = random_image(*size)
    expected = processor(pad_to_square(image), return_tensors="np")["pixel_values"][0]
    pixels = preprocess(image, 24)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (24, 24, 3))
    np.testing.assert_allclose(normalise(pixels), expected, atol=1e-4)


@NORMALISATIONS
@pytest.mark.parametrize("size", [(50, 30), (31, 64), (24, 24)])
def test_transformers_makes_the_same_pixels_from_the_exported_config(size, mean, std, tmp_path):
    settings = preprocessor_config(24, mean, std)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = AutoImageProcessor.from_pretrained(str(tmp_path))
    image = random_image(*size)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    pixels = preprocess(image, 24, mean_color(mean))
    np.testing.assert_allclose(normalise(pixels, mean, std), expected, atol=1e-4)


@pytest.mark.parametrize("size", [1, 5, 24, 336])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 90), (90, 1), (5, 24), (24, 5), (24, 24), (500, 375), (375, 500), (640, 427)],
)
def test_pixels_are_those_of_resizing_the_padded_square_bit_for_bit(shape, size):
    image, color = random_image(*shape), (122, 0, 255)
    side = max(shape)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - shape[0]) // 2, (side - shape[1]) // 2))
    expected = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(preprocess(image, size, color), expected)


def test_image_files_embedded_images_and_paths_are_decoded_alike(tmp_path):
    (tmp_path / "sub").mkdir()
    image = random_image(5, 4)
    image.save(tmp_path / "sub" / "a.png")
    data = (tmp_path / "sub" / "a.png").read_bytes()
    rules = ImageRules(pad_color=PAD_COLOR)
    for result in [
        read_image(ImageFile(str(tmp_path), "sub/a.png"), rules),
        read_image(EmbeddedImage("a", data), rules),
        load_image(str(tmp_path / "sub" / "a.png")),
    ]:
        assert result.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(result), np.asarray(image))


def test_errors_name_the_image_as_its_record_does(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    rules = ImageRules(pad_color=PAD_COLOR)
    expected = "expected a readable image"
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.png: {expected}"):
        read_image(ImageFile(str(tmp_path), "a.png"), rules)
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.png: {expected}"):
        load_image(str(tmp_path / "a.png"))
    with pytest.raises(UserError, match=rf"^images\[2\]: {expected}"):
        read_image(EmbeddedImage("images[2]", b"no image"), rules)


def test_missing_image_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png: .*, got an error: No such file or directory$"):
        load_image(str(tmp_path / "gone.png"))


def test_limits_are_those_of_the_rules(tmp_path):
    random_image(5, 4).save(tmp_path / "a.png")
    rules = ImageRules(pad_color=PAD_COLOR, max_pixels=24)
    with pytest.raises(UserError, match=r"at most data\.max_pixels 24 pixels .*, got 25 \(5 x 4\)"):
        load_image(str(tmp_path / "a.png"), rules)
    with pytest.raises(UserError, match="at most 1,048,768 bytes"):
        read_image(EmbeddedImage("a", bytes(8 * 24 + 2**20 + 1)), rules)


def test_threads_decode_the_same_pixels():
    rules = ImageRules(pad_color=PAD_COLOR)
    images = [EmbeddedImage(name, data) for name, data in samples().items()] * 20
    expected = [np.asarray(read_image(image, rules)) for image in images]
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda image: np.asarray(read_image(image, rules)), images)
        for pixels, other in zip(results, expected, strict=True):
            np.testing.assert_array_equal(pixels, other)
