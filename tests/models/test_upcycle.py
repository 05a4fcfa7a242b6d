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
from moddistill.models.upcycle import COPY, check_upcycle, upcycle, upcycle_config, upcycle_layer
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
    """On an image with text, text alone, and padding."""
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


def test_experts_are_copies_and_all_else_is_left_alone():
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


KERNELS = ("gate", "up", "down")


def dense_layer(mlp=400, width=6, dtype=jnp.float32):
    """The parameters of a layer that upcycling reads; means and deviations of kernels differ."""
    shapes = {"gate": (width, mlp), "up": (width, mlp), "down": (mlp, width)}
    kernels = {
        name: {"kernel": (i + 1) * (1 + draw.normal(*shape, seed=i)).astype(dtype)}
        for i, (name, shape) in enumerate(shapes.items())
    }
    return {"mlp": kernels, "attention_norm": {"scale": jnp.ones(width)}}


def rows(kernel, name):
    """With the feed-forward dimensions in front."""
    return np.asarray(kernel if name == "down" else kernel.T, np.float32)


def experts(layer, moe, how=COPY):
    """`[{gate, up, down}, ...]`, their feed-forward dimensions in front."""
    params = upcycle_layer(layer, moe, jax.random.key(0), how)["moe"]
    return [
        {name: rows(params[f"experts_{name}"][e], name) for name in KERNELS}
        for e in range(moe.num_experts)
    ]


def test_one_layer_alone_gets_the_experts_it_has_in_the_model():
    config = upcycle_config(DENSE, ExpertConfig(4, 2, residual=True))
    noise = UpcycleConfig("noise", noise_std=0.1)
    sparse = upcycle(PARAMS, config, jax.random.key(3), noise)
    whole = unstack(sparse["decoder"], config.decoder.plan)
    layers = unstack(PARAMS["decoder"], DECODER.plan)
    for i in config.decoder.moe_layers:
        rng = jax.random.fold_in(jax.random.key(3), i)
        alone = upcycle_layer(layers[i], config.decoder.moe, rng, noise)
        chex.assert_trees_all_equal(alone, whole[i])


def test_slices_of_a_copy_lie_side_by_side_and_share_its_router_column():
    layer = dense_layer(mlp=12)
    moe = ExpertConfig(8, 4, moe_intermediate_size=6)
    for e, expert in enumerate(experts(layer, moe)):
        half = slice(6 * (e % 2), 6 * (e % 2) + 6)
        for name in KERNELS:
            dense = rows(layer["mlp"][name]["kernel"], name)[half]
            np.testing.assert_array_equal(expert[name], 2 * dense if name == "down" else dense)
    router = upcycle_layer(layer, moe, jax.random.key(0))["moe"]["router"]
    np.testing.assert_array_equal(router[:, ::2], router[:, 1::2])
    assert len(np.unique(np.asarray(router[0]))) == 4


def test_noise_of_the_given_deviation_is_added_to_every_copy_by_itself():
    layer = dense_layer(width=20)
    noises = []
    for expert in experts(layer, ExpertConfig(3, 2), UpcycleConfig("noise", noise_std=0.05)):
        for name in KERNELS:
            noise = expert[name] - rows(layer["mlp"][name]["kernel"], name)
            np.testing.assert_allclose(noise.std(), 0.05, rtol=0.05)
            np.testing.assert_allclose(noise.mean(), 0, atol=0.003)
            noises.append(noise.reshape(-1))
    correlation = np.corrcoef(noises)
    assert np.abs(correlation - np.eye(9)).max() < 0.06


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_dropped_dimensions_are_those_of_all_three_kernels_and_differ_between_experts(fraction):
    layer = dense_layer()
    all_dropped = []
    how = UpcycleConfig("drop", drop_fraction=fraction)
    for expert in experts(layer, ExpertConfig(4, 2), how):
        changed = {
            name: expert[name] != rows(layer["mlp"][name]["kernel"], name) for name in KERNELS
        }
        dropped = changed["gate"].any(axis=1)
        assert dropped.sum() == round(fraction * 400)
        for name in KERNELS:
            np.testing.assert_array_equal(changed[name], np.repeat(dropped[:, None], 6, axis=1))
        all_dropped.append(tuple(dropped))
    assert len(set(all_dropped)) == (1 if fraction == 1 else 4)


def test_dropped_entries_are_drawn_with_their_mean_and_deviation():
    # Kept dimensions are far away, so statistics of a whole kernel would not do.
    layer = dense_layer(width=40)
    moe, how = ExpertConfig(2, 2), UpcycleConfig("drop", drop_fraction=0.5)
    dropped = [
        expert["gate"][:, 0] != rows(layer["mlp"]["gate"]["kernel"], "gate")[:, 0]
        for expert in experts(layer, moe, how)
    ]
    for e, chosen in enumerate(dropped):
        # Which dimensions are dropped depends on the rng alone.
        for name in KERNELS:
            kernel = layer["mlp"][name]["kernel"]
            away = jnp.where(chosen, 0.0, 1e3)
            moved = kernel + (away[:, None] if name == "down" else away[None])
            changed = {**layer, "mlp": {**layer["mlp"], name: {"kernel": moved}}}
            new = experts(changed, moe, how)[e][name]
            old = rows(kernel, name)[chosen]
            np.testing.assert_allclose(new[chosen].mean(), old.mean(), atol=0.05 * old.std())
            np.testing.assert_allclose(new[chosen].std(), old.std(), rtol=0.05)
            first = new[chosen] - new[chosen].mean()
            assert abs((first * (old - old.mean())).mean()) < 0.05 * old.var()


def test_slices_are_dropped_by_their_own_width():
    moe = ExpertConfig(4, 2, moe_intermediate_size=200)
    layer = dense_layer()
    how = UpcycleConfig("drop", drop_fraction=0.3)
    for e, expert in enumerate(experts(layer, moe, how)):
        half = slice(200 * (e % 2), 200 * (e % 2) + 200)
        dense = rows(layer["mlp"]["up"]["kernel"], "up")[half]
        assert (expert["up"] != dense).any(axis=1).sum() == 60


VARIANTS = {
    "copy": (ExpertConfig(4, 2), COPY),
    "noise": (ExpertConfig(4, 2), UpcycleConfig("noise", noise_std=0.1)),
    "drop": (ExpertConfig(4, 2), UpcycleConfig("drop", drop_fraction=0.5)),
    "split": (ExpertConfig(4, 2, moe_intermediate_size=200), COPY),
}


@pytest.mark.parametrize(("moe", "how"), VARIANTS.values(), ids=VARIANTS)
def test_arrays_keep_their_dtype_and_follow_the_seed(moe, how):
    layer = dense_layer(dtype=jnp.bfloat16)
    first, again, other = (
        upcycle_layer(layer, moe, jax.random.key(seed), how)["moe"] for seed in (0, 0, 1)
    )
    dtypes = {name: str(x.dtype) for name, x in first.items()}
    assert dtypes == {f"experts_{name}": "bfloat16" for name in KERNELS} | {"router": "float32"}
    chex.assert_trees_all_equal(first, again)
    assert np.any(first["router"] != other["router"])
    drawn = np.any(first["experts_down"] != other["experts_down"])
    assert drawn == (how.method != "copy")
