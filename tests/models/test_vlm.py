import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import ExpertConfig
from moddistill.models.compute import ComputeConfig
from moddistill.models.decoder import DecoderConfig, init_cache
from moddistill.models.layers import exact_gelu
from moddistill.models.upcycle import upcycle_config
from moddistill.models.vision import Vision, VisionConfig
from moddistill.models.vlm import ModelConfig, Vlm, dummy_batch, splice
from tests.models import draw

IMAGE = 20
DECODER = DecoderConfig(
    vocab_size=23,
    real_ids=((0, 20),),
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)
TOWER = VisionConfig(
    image_size=8, patch_size=4, hidden_size=6, intermediate_size=8, num_layers=2, num_heads=2
)
DENSE = ModelConfig(DECODER, TOWER, "mlp2x_gelu", "vicuna", IMAGE)
SPARSE = upcycle_config(DENSE, ExpertConfig(num_experts=3, top_k=2))
BOTH = pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("..aaaa.", "??0123?"),
        ("aaaabbbb", "01234567"),
        (".aaaa.bbbb", "?0123?4567"),
        ("......", "??????"),
    ],
)
def test_the_nth_patch_is_at_the_nth_image_position(layout, expected):
    patches = jnp.arange(8.0)[None, :, None]
    is_image = jnp.array([[letter != "." for letter in layout]])
    spliced = splice(patches, is_image)
    chex.assert_shape(spliced, (1, len(layout), 1))
    found = "".join(
        str(int(patch)) if image else "?"
        for patch, image in zip(spliced[0, :, 0], is_image[0], strict=True)
    )
    assert found == expected


def test_rows_are_spliced_apart():
    patches = jnp.array([[[1.0], [2.0]], [[3.0], [4.0]], [[5.0], [6.0]]])
    is_image = jnp.array([[True, True, False], [False, False, False], [False, True, True]])
    spliced = jnp.where(is_image[..., None], splice(patches, is_image), 0)
    np.testing.assert_array_equal(spliced[..., 0], [[1, 2, 0], [0, 0, 0], [0, 5, 6]])


def image_batch():
    """Two images, none (its slots hold noise), and one with padding behind."""
    batch = draw.text(DECODER, 3, 12)
    tokens = batch.tokens.at[0, 1:5].set(IMAGE).at[0, 7:11].set(IMAGE).at[2, 0:4].set(IMAGE)
    segments = batch.segments.at[2, 9:].set(0)
    images = draw.pixels(3, 2, 8, 8, 3)
    return batch._replace(tokens=tokens, segments=segments, images=images)


@functools.cache
def random_params(config):
    return draw.params(Vlm(config), dummy_batch(config))


def run(config, batch, params=None, dtype=jnp.float32):
    """Logits, the whole output, and parameters."""
    model = Vlm(config, ComputeConfig(dtype=dtype))
    params = random_params(config) if params is None else params
    output = draw.apply(model, params, batch)
    return np.asarray(Vlm.logits(output)), output, params


def test_image_positions_hold_projected_features_and_others_the_embedding():
    # Without layers the hidden states are the normalised inputs of the decoder.
    config = dataclasses.replace(DENSE, decoder=dataclasses.replace(DECODER, num_layers=0))
    batch = image_batch()
    _, output, params = run(config, batch)

    flat = batch.images.reshape(-1, 8, 8, 3)
    x = Vision(TOWER, ComputeConfig()).apply({"params": params["vision"]}, flat)
    first, second = params["projector"]["linear_0"], params["projector"]["linear_1"]
    x = exact_gelu(x @ first["kernel"] + first["bias"][None, None])
    x = (x @ second["kernel"] + second["bias"][None, None]).reshape(3, 8, 8)
    expected = np.array(params["decoder"]["embedding"][batch.tokens])
    expected[0, 1:5], expected[0, 7:11], expected[2, 0:4] = x[0, :4], x[0, 4:], x[2, :4]
    expected /= np.sqrt(np.mean(np.square(expected), -1, keepdims=True) + DECODER.norm_eps)
    expected *= np.asarray(params["decoder"]["norm"]["scale"])
    np.testing.assert_allclose(output.hidden, expected, atol=1e-4)


@BOTH
def test_images_of_unused_slots_and_text_rows_have_no_effect(config):
    batch = image_batch()
    logits, _, params = run(config, batch)
    images = batch.images.at[1].set(0).at[2, 1].set(0)
    changed, _, _ = run(config, batch._replace(images=images), params)
    np.testing.assert_array_equal(changed, logits)


@BOTH
def test_an_image_changes_only_positions_from_its_first_patch_on(config):
    batch = image_batch()
    logits, _, params = run(config, batch)
    changed, _, _ = run(config, batch._replace(images=batch.images.at[0, 1].set(255)), params)
    same = np.abs(changed - logits).max(axis=-1) < 1e-5
    np.testing.assert_array_equal(same[0], [True] * 7 + [False] * 5)
    assert same[1:].all()


@BOTH
def test_padding_has_no_effect(config):
    batch = image_batch()
    logits, output, params = run(config, batch)
    tokens = batch.tokens.at[2, 9:].set(jnp.array([IMAGE, 1, 2]))
    changed, other, _ = run(config, batch._replace(tokens=tokens), params)
    valid = np.asarray(batch.segments) > 0
    np.testing.assert_allclose(changed[valid], logits[valid], atol=1e-6)
    if output.router is not None:
        chex.assert_trees_all_close(other.router, output.router, atol=1e-5)


@BOTH
def test_a_row_does_not_depend_on_its_batch(config):
    batch = image_batch()
    logits, _, params = run(config, batch)
    for i in range(3):
        single, _, _ = run(config, jax.tree.map(lambda x, i=i: x[i : i + 1], batch), params)
        valid = np.asarray(batch.segments[i]) > 0
        np.testing.assert_allclose(single[0, valid], logits[i, valid], atol=1e-5)


@BOTH
def test_packed_samples_equal_samples_apart(config):
    text = draw.text(DECODER, 1, 7)
    packed = text._replace(
        positions=jnp.array([[0, 1, 2, 0, 1, 2, 3]], jnp.int32),
        segments=jnp.array([[1, 1, 1, 2, 2, 2, 2]], jnp.int32),
    )
    logits, _, params = run(config, packed)
    for part in (slice(0, 3), slice(3, 7)):
        single = jax.tree.map(lambda x, part=part: x[:, part], packed)
        single = single._replace(segments=jnp.ones_like(single.segments))
        np.testing.assert_allclose(run(config, single, params)[0], logits[:, part], atol=1e-5)


def test_statistics_have_one_row_for_each_expert_layer():
    _, output, _ = run(SPARSE, image_batch())
    np.testing.assert_array_equal(output.router.tokens, [33, 33])  # layers 0 and 2; 12 + 12 + 9
    np.testing.assert_array_equal(output.router.load.sum(-1), [[2 * 21, 2 * 12]] * 2)


@BOTH
@pytest.mark.parametrize(("prompt", "images"), [(11, True), (11, False), (6, False), (1, False)])
def test_decoding_with_a_cache_equals_the_full_forward(config, prompt, images):
    batch = jax.tree.map(lambda x: x[:1], image_batch())
    text = batch._replace(images=None)
    expected, _, params = run(config, batch if images else text)

    slots, length = 13, 12
    cache = init_cache(config.decoder, ComputeConfig(), 1, slots)
    logits = []
    for start, end in [(0, prompt)] + [(i, i + 1) for i in range(prompt, length)]:
        now = jax.tree.map(lambda x, start=start, end=end: x[:, start:end], text)
        if images and start == 0:  # both images lie before position 11
            now = now._replace(images=batch.images)
        output = draw.apply(Vlm(config), params, now, cache)
        logits.append(Vlm.logits(output))
        cache = output.cache
    assert cache.length.tolist() == [length]
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), expected, atol=1e-4)


def test_half_precision_gives_half_precision_states_and_float32_logits():
    batch = image_batch()
    logits, output, params = run(SPARSE, batch, dtype=jnp.bfloat16)
    assert output.hidden.dtype == output.head.dtype == jnp.bfloat16
    assert logits.dtype == np.float32
    assert {x.dtype for x in jax.tree.leaves(output.router)} == {jnp.dtype(jnp.float32)}
    full, _, _ = run(SPARSE, batch, params)
    assert 0 < np.abs(logits - full).max() < 0.5


@pytest.mark.parametrize("config", [DENSE, dataclasses.replace(DENSE, vision=None)])
def test_the_dummy_batch_touches_every_parameter(config):
    model, batch = Vlm(config), dummy_batch(config)
    params = draw.params(model, batch)
    parts = {"decoder"} | ({"vision", "projector"} if config.vision else set())
    assert params.keys() == parts
    chex.assert_shape(model.apply({"params": params}, batch).hidden, (1, 1, 8))
