import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.models.compute import ComputeConfig
from moddistill.models.vision import Vision, VisionConfig, normalise, patchify
from tests.models import draw

NEVER_COMPUTED = ("unused", "post_norm")
CONFIG = VisionConfig(
    image_size=12, patch_size=4, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2
)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(4, 4, 2), (6, 9, 3), (5, 5, 5), (2, 3, 1), (5, 7, 2), (8, 6, 3), (7, 7, 4)],
)
def test_patches_are_in_reading_order_and_flat_by_row_column_and_channel(height, width, size):
    images = draw.normal(2, height, width, 3)
    patches = patchify(images, size)
    chex.assert_shape(patches, (2, (height // size) * (width // size), size * size * 3))
    expected = [
        [images[i, y + row, x + column, channel]
         for row in range(size) for column in range(size) for channel in range(3)]
        for i in range(2)
        for y in range(0, height - size + 1, size) for x in range(0, width - size + 1, size)
    ]  # fmt: skip
    np.testing.assert_array_equal(patches.reshape(-1, size * size * 3), np.array(expected))


def test_pixels_are_scaled_and_normalised_by_channel():
    config = dataclasses.replace(CONFIG, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    images = jnp.array([[[[0, 0, 0], [255, 255, 255], [51, 51, 51]]]], jnp.uint8)
    expected = [[[[0, -1, -4], [1, 1, 0], [0.2, -0.6, -3.2]]]]
    np.testing.assert_allclose(normalise(images, config), expected, atol=1e-6)


def tower(config, remat="none"):
    vision = Vision(config, ComputeConfig(remat=remat))
    return vision, draw.params(vision, draw.pixels(1, 12, 12, 3))


@pytest.mark.parametrize(
    ("layers", "select", "used"), [(24, -2, 23), (3, -1, 3), (3, -2, 2), (5, -3, 3)]
)
def test_layers_above_the_selected_hidden_state_are_kept_apart(layers, select, used):
    config = dataclasses.replace(CONFIG, num_layers=layers, select_layer=select)
    assert config.used_layers == used
    params = tower(config)[1]
    chex.assert_tree_shape_prefix(params["layers"], (used,))
    assert ("unused" in params) == (used < layers)
    if used < layers:
        chex.assert_tree_shape_prefix(params["unused"], (layers - used,))
        chex.assert_trees_all_equal_structs(params["unused"], params["layers"])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_is_never_computed_is_made_by_init_and_ignored_by_apply(remat):
    vision, params = tower(dataclasses.replace(CONFIG, select_layer=-2), remat)
    images = draw.pixels(2, 12, 12, 3)
    assert set(NEVER_COMPUTED) < params.keys()
    broken = {name: jax.tree.map(lambda x: x * jnp.nan, params[name]) for name in NEVER_COMPUTED}
    expected = draw.apply(vision, params, images)
    np.testing.assert_array_equal(draw.apply(vision, params | broken, images), expected)
    computed = {name: leaf for name, leaf in params.items() if name not in NEVER_COMPUTED}
    np.testing.assert_array_equal(draw.apply(vision, computed, images), expected)


def test_parameters_are_named_and_split_as_those_of_the_used_layers():
    vision = Vision(dataclasses.replace(CONFIG, select_layer=-3), ComputeConfig())
    params = jax.eval_shape(vision.init, jax.random.key(0), draw.pixels(1, 12, 12, 3))["params"]
    names, unused = (
        jax.tree.map(lambda x: x.names, params[part], is_leaf=lambda x: hasattr(x, "names"))
        for part in ("layers", "unused")
    )
    assert names == unused
    assert names["up"]["kernel"] == ("layers", "embed", "mlp")
    assert params["post_norm"]["scale"].names == ("embed",)


def test_a_tower_without_class_token_gives_all_its_positions():
    plain = {"class_token": False, "pre_norm": False, "patch_bias": True}
    vision, params = tower(dataclasses.replace(CONFIG, select_layer=-1, **plain))
    assert params.keys() == {"patch", "positions", "layers", "post_norm"}
    assert params["patch"].keys() == {"kernel", "bias"}
    chex.assert_shape(params["positions"], (9, 8))
    chex.assert_shape(draw.apply(vision, params, draw.pixels(2, 12, 12, 3)), (2, 9, 8))


def test_pixels_after_the_last_complete_patch_are_ignored():
    config = dataclasses.replace(CONFIG, image_size=15)
    vision, images = Vision(config, ComputeConfig()), draw.pixels(1, 15, 15, 3)
    params = draw.params(vision, images)
    assert config.patches == 9
    expected = draw.apply(vision, params, images)
    changed = images.at[:, 12:].set(0).at[:, :, 12:].set(0)
    np.testing.assert_array_equal(draw.apply(vision, params, changed), expected)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"activation": "quick_gelo"}, r"'gelu_tanh', got 'quick_gelo' .*did you .*'quick_ge"),
        ({"select_layer": -4}, r"select_layer: expected -3 to -1, .* of 3 layers, got -4"),
        ({"select_layer": 0}, r"select_layer: .*, got 0"),
    ],
)
def test_settings_without_a_meaning_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(CONFIG, **changes)


def test_features_are_those_below_the_selected_layer():
    vision, params = tower(dataclasses.replace(CONFIG, num_layers=4, select_layer=-3))
    shorter = Vision(dataclasses.replace(CONFIG, num_layers=2, select_layer=-1), ComputeConfig())
    images = draw.pixels(2, 12, 12, 3)
    ours, expected = (draw.apply(v, params, images) for v in (vision, shorter))
    chex.assert_shape(ours, (2, CONFIG.patches, CONFIG.hidden_size))
    np.testing.assert_array_equal(ours, expected)


def test_every_patch_has_its_own_position():
    # Attention is off, as values are zero, so a changed patch changes only its own feature.
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

    plain, saved = features_and_gradients("none"), features_and_gradients("full")
    chex.assert_trees_all_close(saved, plain, atol=1e-5, rtol=1e-5)
