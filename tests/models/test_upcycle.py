import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import ExpertConfig, UpcycleConfig
from moddistill.errors import UserError
from moddistill.models.decoder import DecoderConfig
from moddistill.models.layer_plan import unstack
from moddistill.models.upcycle import check_upcycle, upcycle, upcycle_config
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig, Vlm, dummy_batch
from tests.models import draw

DECODER = DecoderConfig(
    vocab_size=23,
    real_ids=((0, 20),),
    hidden_size=8,
    intermediate_size=12,
    num_layers=5,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)
TOWER = VisionConfig(
    image_size=8, patch_size=4, hidden_size=6, intermediate_size=8, num_layers=2, num_heads=2
)
DENSE = ModelConfig(DECODER, TOWER, "linear", "vicuna", image_token_id=20)
PARAMS = draw.params(Vlm(DENSE), dummy_batch(DENSE))


def logits(config, params):
    """On an image with text, only text, and padding."""
    batch = draw.text(DECODER, 2, 9)
    batch = batch._replace(
        tokens=batch.tokens.at[0, 2:6].set(20),
        segments=batch.segments.at[1, 7:].set(0),
        images=draw.pixels(2, 1, 8, 8, 3),
    )
    output = draw.apply(Vlm(config), params, batch)
    return np.asarray(Vlm.logits(output))[np.asarray(batch.segments) > 0]


@pytest.fixture(scope="module")
def dense_logits():
    return logits(DENSE, PARAMS)


MOES = {
    "two of four": ExpertConfig(4, 2),
    "three of four": ExpertConfig(4, 3),
    "all": ExpertConfig(3, 3),
    "all layers": ExpertConfig(4, 2, "dense"),
    "first half": ExpertConfig(4, 2, "first_half"),
    "second half": ExpertConfig(4, 2, "second_half"),
    "listed layers": ExpertConfig(2, 2, (1, 4)),
    "one of four, renormalised": ExpertConfig(4, 1, norm_topk_prob=True),
    "residual": ExpertConfig(4, 2, residual=True),
    "ample capacity": ExpertConfig(4, 2, dispatch="capacity", capacity_factor=2.0),
    "halves, one copy of two": ExpertConfig(4, 2, moe_intermediate_size=6),
    "halves, two copies of four": ExpertConfig(8, 4, moe_intermediate_size=6),
    "halves, all": ExpertConfig(4, 4, moe_intermediate_size=6),
    "thirds, one copy of two": ExpertConfig(6, 3, moe_intermediate_size=4),
    "thirds, two copies of four": ExpertConfig(12, 6, moe_intermediate_size=4),
    "halves and a residual": ExpertConfig(4, 2, residual=True, moe_intermediate_size=6),
    "halves with ample capacity": ExpertConfig(
        4, 2, dispatch="capacity", capacity_factor=2.0, moe_intermediate_size=6
    ),
    "as wide as the dense layer": ExpertConfig(4, 2, moe_intermediate_size=12),
}


@pytest.mark.parametrize("moe", MOES.values(), ids=MOES)
def test_the_sparse_student_starts_with_the_logits_of_the_dense_one(dense_logits, moe):
    config = upcycle_config(DENSE, moe)
    sparse = logits(config, upcycle(PARAMS, config, jax.random.key(0)))
    assert dense_logits.std() > 0.1
    np.testing.assert_allclose(sparse, dense_logits, atol=1e-5)


def test_a_single_raw_weight_scales_the_feed_forward_layer_by_the_largest_probability():
    # One token and one layer, so that the dense feed-forward's share of the output is known.
    decoder = dataclasses.replace(DECODER, num_layers=1)
    dense = ModelConfig(decoder, None, "linear", "vicuna", image_token_id=20)
    params = draw.params(Vlm(dense), dummy_batch(dense))
    sparse = upcycle_config(dense, ExpertConfig(4, 1))
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


def test_experts_are_copies_and_other_parameters_are_unchanged():
    config = upcycle_config(DENSE, ExpertConfig(4, 2, residual=True))
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


@pytest.mark.parametrize("size", [0, 6])
def test_parameters_fit_the_sparse_architecture(size):
    config = upcycle_config(DENSE, ExpertConfig(4, 2, residual=True, moe_intermediate_size=size))
    expected = draw.params(Vlm(config), dummy_batch(config))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        upcycle(PARAMS, config, jax.random.key(0)), expected
    )


def test_routers_are_small_float32_and_differ_between_layers():
    config = upcycle_config(DENSE, ExpertConfig(8, 2, "dense"))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    moe = upcycle(half, config, jax.random.key(0))["decoder"]["segment_0"]["block_0"]["moe"]
    assert moe["router"].dtype == jnp.float32 and moe["experts_gate"].dtype == jnp.bfloat16
    np.testing.assert_allclose(moe["router"].std(), 0.02, rtol=0.2)
    assert len({float(router[0, 0]) for router in moe["router"]}) == 5


def test_a_sparse_model_is_not_upcycled_again():
    with pytest.raises(
        ValueError, match=r"expected a dense model .*, got one with 4 experts in layers \(0, 2, 4\)"
    ):
        upcycle_config(upcycle_config(DENSE, ExpertConfig()), ExpertConfig())


@pytest.mark.parametrize(
    ("moe", "named"),
    [
        (ExpertConfig(2, 3), "top_k: .*, got 3"),
        (ExpertConfig(10**9), "moe.num_experts: expected 1 to 1,000, got 1000000000"),
        (ExpertConfig(placement=(5,)), "from 0 to 4"),
        (ExpertConfig(moe_intermediate_size=5), "size: expected 0, or .* layer's width, 12, got 5"),
        (
            ExpertConfig(moe_intermediate_size=24),
            "size: expected 0, or .* layer's width, 12, got 24",
        ),
        (ExpertConfig(4, 3, moe_intermediate_size=4), "num_experts: .* of 3, .* 3 experts, got 4"),
        (ExpertConfig(6, 2, moe_intermediate_size=4), "top_k: .* of 3, .* 3 experts, got 2"),
        (
            ExpertConfig(4, 2, norm_topk_prob=False, moe_intermediate_size=6),
            "norm_topk_prob: expected True, .*_size 6 .* 12 into 2 experts.*, got False",
        ),
    ],
)
def test_experts_that_do_not_fit_are_named(moe, named):
    with pytest.raises(ValueError, match=named):
        upcycle_config(DENSE, moe)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": "dropp"},
            r"^upcycle\.method: expected one of 'copy', .*, got 'dropp' \(did you mean 'drop'\?\)$",
        ),
        ({"noise_std": 0.1}, r"^upcycle\.noise_std: expected 0 with method 'copy', .*, got 0\.1$"),
        ({"method": "drop", "drop_fraction": 0.5, "noise_std": 0.1}, r"noise_std: .*, got 0\.1$"),
        ({"method": "noise"}, r"noise_std: expected > 0 and <= 10,000 with 'noise', got 0\.0$"),
        ({"method": "noise", "noise_std": -1.0}, r"noise_std: expected > 0 .*, got -1\.0$"),
        ({"method": "noise", "noise_std": 1e39}, r"> 0 and <= 10,000 .*, got 1e\+39$"),
        ({"method": "noise", "noise_std": float("inf")}, r"noise_std: .*, got inf$"),
        ({"method": "noise", "noise_std": float("nan")}, r"noise_std: .*, got nan$"),
        ({"drop_fraction": 0.5}, r"^upcycle\.drop_fraction: expected 0 with method 'copy'"),
        ({"method": "drop"}, r"drop_fraction: expected > 0 and <= 1 with 'drop', got 0\.0$"),
        ({"method": "drop", "drop_fraction": 1.5}, r"drop_fraction: .* <= 1 .*, got 1\.5$"),
    ],
)
def test_upcycle_settings_out_of_range_are_named(fields, message):
    how = UpcycleConfig()
    for name, value in fields.items():
        # Names that the annotations do not have are refused there, where tests check those.
        object.__setattr__(how, name, value)
    with pytest.raises(UserError, match=message):
        check_upcycle(how)
