import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor

from moddistill.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    load_image,
    mean_color,
    pad_to_square,
    preprocess,
)
from moddistill.storage.model_folder import preprocessor_config


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


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_colour_mode_is_read_as_rgb(mode, tmp_path):
    path = tmp_path / "a.tiff"
    random_image(5, 4).convert(mode).save(path)
    assert (load_image(str(path)).mode, load_image(str(path)).size) == ("RGB", (5, 4))


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_pixels_are_scaled_to_8_bits(order, name, tmp_path):
    """65535 / 257 is 255: white stays white, and `257 * byte` becomes `byte`."""
    shades = np.array([[0, 128, 256, 257], [30000, 32768, 65407, 65535]], order)
    Image.fromarray(shades).save(tmp_path / name)
    expected = [[0, 0, 1, 1], [117, 128, 255, 255]]
    pixels = np.asarray(load_image(str(tmp_path / name)))
    np.testing.assert_array_equal(pixels, np.repeat(np.array(expected)[..., None], 3, axis=2))


@pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32)])
def test_pixels_without_a_known_range_are_an_error(mode, dtype, tmp_path):
    path = tmp_path / "a.tiff"
    Image.fromarray(np.full((4, 5), 900, dtype)).save(path)
    with pytest.raises(ValueError, match=rf"a\.tiff: .*expected 8 or 16 bits .*, got {mode!r}"):
        load_image(str(path))


# A changed byte in the header: Pillow raises RuntimeError for AVIF, TypeError for TIFF.
@pytest.mark.parametrize(("name", "offset", "byte"), [("a.avif", 81, 0), ("a.tiff", 72, 2)])
def test_any_exception_of_a_decoder_is_an_error_that_names_the_file(name, offset, byte, tmp_path):
    path = tmp_path / name
    random_image(8, 8).save(path)
    data = bytearray(path.read_bytes())
    data[offset] = byte
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: expected a readable image"):
        load_image(str(path))


@pytest.mark.parametrize("size", [0, 20, 60, 900])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_truncated_image_file_is_an_error_that_names_it(name, size, tmp_path):
    path = tmp_path / name
    random_image(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{name}: expected a readable image"):
        load_image(str(path))


def test_missing_image_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_image(str(tmp_path / "gone.png"))
