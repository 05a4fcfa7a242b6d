import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.models.vision import Vision, VisionConfig, normalise, patchify
from tests.models import draw

CONFIG = VisionConfig(image_size=12, patch_size=4, width=8, mlp=12, layers=3, heads=2)


@pytest.mark.parametrize(("height", "width", "size"), [(4, 4, 2), (6, 9, 3), (5, 5, 5), (2, 3, 1)])
def test_patches_are_in_reading_order_and_flat_by_row_column_and_channel(height, width, size):
    images = draw.normal(2, height, width, 3)
    patches = patchify(images, size)
    chex.assert_shape(patches, (2, (height // size) * (width // size), size * size * 3))
    expected = [
        [images[i, y + row, x + column, channel]
         for row in range(size) for column in range(size) for channel in range(3)]
        for i in range(2) for y in range(0, height, size) for x in range(0, width, size)
    ]  # fmt: skip
    np.testing.assert_array_equal(patches.reshape(-1, size * size * 3), np.array(expected))


def test_pixels_are_scaled_and_normalised_by_channel():
    config = dataclasses.replace(CONFIG, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    images = jnp.array([[[[0, 0, 0], [255, 255, 255], [51, 51, 51]]]], jnp.uint8)
    expected = [[[[0, -1, -4], [1, 1, 0], [0.2, -0.6, -3.2]]]]
    np.testing.assert_allclose(normalise(images, config), expected, atol=1e-6)


def tower(config, remat=False):
    vision = Vision(config, jnp.float32, remat)
    return vision, draw.params(vision, draw.pixels(1, 12, 12, 3))


@pytest.mark.parametrize(
    ("layers", "select", "used"), [(24, -2, 23), (3, -1, 3), (3, -2, 2), (5, -3, 3)]
)
def test_layers_above_the_selected_hidden_state_have_no_parameters(layers, select, used):
    config = dataclasses.replace(CONFIG, layers=layers, select_layer=select)
    assert config.used_layers == used
    chex.assert_tree_shape_prefix(tower(config)[1]["layers"], (used,))


def test_features_are_those_below_the_selected_layer():
    vision, params = tower(dataclasses.replace(CONFIG, layers=4, select_layer=-3))
    shorter = Vision(dataclasses.replace(CONFIG, layers=2, select_layer=-1), jnp.float32, False)
    images = draw.pixels(2, 12, 12, 3)
    ours, expected = (draw.apply(v, params, images) for v in (vision, shorter))
    chex.assert_shape(ours, (2, CONFIG.patches, CONFIG.width))
    np.testing.assert_array_equal(ours, expected)


def test_every_patch_is_seen_in_its_own_place():
    # Attention is off, as values are zero, so a changed patch changes its own feature alone.
    vision, params = tower(CONFIG)
    value = params["layers"]["attention"]["value"]
    params["layers"]["attention"]["value"] = jax.tree.map(jnp.zeros_like, value)
    images = draw.pixels(1, 12, 12, 3)
    changed = images.at[:, 4:8, 8:12].set(255 - images[:, 4:8, 8:12])
    difference = draw.apply(vision, params, changed) - draw.apply(vision, params, images)
    moved = np.abs(difference[0]).max(axis=-1) > 1e-4
    np.testing.assert_array_equal(np.flatnonzero(moved), [5])  # second row, third column


def test_rematerialised_layers_give_the_same_features_and_gradients():
    images = draw.pixels(2, 12, 12, 3)

    def features_and_gradients(remat):
        vision, params = tower(CONFIG, remat)

        def loss(params):
            features = vision.apply({"params": params}, images)
            return jnp.sum(features**2), features

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    plain, saved = features_and_gradients(False), features_and_gradients(True)
    chex.assert_trees_all_close(saved, plain, atol=1e-5, rtol=1e-5)
