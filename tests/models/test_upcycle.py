import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import MoeConfig
from moddistill.models.layer_plan import unstack
from moddistill.models.qwen import DecoderConfig
from moddistill.models.upcycle import upcycle, upcycle_config
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig, Vlm, dummy_batch
from tests.models import draw

DECODER = DecoderConfig(
    vocab_size=23, real_vocab=20, width=8, mlp=12, layers=5, heads=2, kv_heads=1, head_dim=4
)
TOWER = VisionConfig(image_size=8, patch_size=4, width=6, mlp=8, layers=2, heads=2)
DENSE = ModelConfig(DECODER, TOWER, "linear", "vicuna", image_token=20)
PARAMS = draw.params(Vlm(DENSE), dummy_batch(DENSE))


def logits(config, params):
    """On an image with text, text alone, and padding."""
    batch = draw.text(DECODER, 2, 9)
    batch["tokens"] = batch["tokens"].at[0, 2:6].set(20)
    batch["segments"] = batch["segments"].at[1, 7:].set(0)
    batch["images"] = draw.pixels(2, 1, 8, 8, 3)
    output = draw.apply(Vlm(config), params, batch)
    return np.asarray(Vlm.logits(output))[np.asarray(batch["segments"]) > 0]


@pytest.fixture(scope="module")
def dense_logits():
    return logits(DENSE, PARAMS)


MOES = {
    "two of four": MoeConfig(4, 2),
    "three of four": MoeConfig(4, 3),
    "all": MoeConfig(3, 3),
    "all layers": MoeConfig(4, 2, "dense"),
    "first half": MoeConfig(4, 2, "first_half"),
    "second half": MoeConfig(4, 2, "second_half"),
    "listed layers": MoeConfig(2, 2, (1, 4)),
    "one of four, renormalised": MoeConfig(4, 1, norm_topk_prob=True),
    "residual": MoeConfig(4, 2, residual=True),
    "ample capacity": MoeConfig(4, 2, dispatch="capacity", capacity_factor=2.0),
}


@pytest.mark.parametrize("moe", MOES.values(), ids=MOES)
def test_the_sparse_student_starts_with_the_logits_of_the_dense_one(dense_logits, moe):
    config = upcycle_config(DENSE, moe)
    sparse = logits(config, upcycle(PARAMS, config, jax.random.key(0)))
    assert dense_logits.std() > 0.1
    np.testing.assert_allclose(sparse, dense_logits, atol=1e-5)


def test_a_single_raw_weight_scales_the_feed_forward_layer_by_the_largest_probability():
    # One token and one layer, so that the dense feed-forward's share of the output is known.
    decoder = dataclasses.replace(DECODER, layers=1)
    dense = ModelConfig(decoder, None, "linear", "vicuna", image_token=20)
    params = draw.params(Vlm(dense), dummy_batch(dense))
    sparse = upcycle_config(dense, MoeConfig(4, 1))
    upcycled = upcycle(params, sparse, jax.random.key(0))
    router = upcycled["decoder"]["segment_0"]["block_0"]["moe"]["router"]
    upcycled["decoder"]["segment_0"]["block_0"]["moe"]["router"] = 50 * router
    output = draw.apply(Vlm(sparse), upcycled, dummy_batch(dense))
    largest = output.router.prob.max()
    assert 0.3 < largest < 0.99

    mlp = params["decoder"]["segment_0"]["block_0"]["mlp"]
    mlp["down"]["kernel"] = largest * mlp["down"]["kernel"]
    expected = draw.apply(Vlm(dense), params, dummy_batch(dense))
    np.testing.assert_allclose(output.hidden, expected.hidden, atol=1e-5)


def test_experts_are_copies_and_all_else_is_left_alone():
    config = upcycle_config(DENSE, MoeConfig(4, 2, residual=True))
    params = upcycle(PARAMS, config, jax.random.key(0))
    for part in ("vision", "projector"):
        chex.assert_trees_all_equal(params[part], PARAMS[part])
    dense = unstack(PARAMS["decoder"], DECODER.plan)
    sparse = unstack(params["decoder"], config.decoder.plan)
    for i, (before, after) in enumerate(zip(dense, sparse, strict=True)):
        if i % 2:
            chex.assert_trees_all_equal(after, before)
            continue
        moe = after["moe"]
        chex.assert_trees_all_equal(moe["residual"], before["mlp"])
        for name, leaf in before["mlp"].items():
            for expert in moe[f"experts_{name}"]:
                np.testing.assert_array_equal(expert, leaf["kernel"])


def test_parameters_fit_the_sparse_architecture():
    config = upcycle_config(DENSE, MoeConfig(4, 2, residual=True))
    expected = draw.params(Vlm(config), dummy_batch(config))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        upcycle(PARAMS, config, jax.random.key(0)), expected
    )


def test_routers_are_small_float32_and_differ_between_layers():
    config = upcycle_config(DENSE, MoeConfig(8, 2, "dense"))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    moe = upcycle(half, config, jax.random.key(0))["decoder"]["segment_0"]["block_0"]["moe"]
    assert moe["router"].dtype == jnp.float32 and moe["experts_gate"].dtype == jnp.bfloat16
    np.testing.assert_allclose(moe["router"].std(), 0.02, rtol=0.2)
    assert len({float(router[0, 0]) for router in moe["router"]}) == 5


def test_a_sparse_model_is_not_upcycled_again():
    with pytest.raises(ValueError, match=r"already has 4 experts in layers \(0, 2, 4\)"):
        upcycle_config(upcycle_config(DENSE, MoeConfig()), MoeConfig())


@pytest.mark.parametrize(
    ("moe", "named"),
    [(MoeConfig(2, 3), "top_k is 3"), (MoeConfig(placement=(5,)), "from 0 to 4")],
)
def test_experts_that_do_not_fit_are_named(moe, named):
    with pytest.raises(ValueError, match=named):
        upcycle_config(DENSE, moe)
