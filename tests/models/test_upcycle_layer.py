"""Upcycling of one layer: experts, routers, noise and re-initialisation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import ExpertConfig, UpcycleConfig
from moddistill.models.layer_plan import unstack
from moddistill.models.upcycle import COPY, upcycle, upcycle_config, upcycle_layer
from tests.models import draw
from tests.models.test_upcycle import DECODER, DENSE, PARAMS

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


def test_upcycling_one_layer_equals_upcycling_the_model():
    config = upcycle_config(DENSE, ExpertConfig(4, 2, residual=True))
    noise = UpcycleConfig("noise", noise_std=0.1)
    sparse = upcycle(PARAMS, config, jax.random.key(3), noise)
    whole = unstack(sparse["decoder"], config.decoder.plan)
    layers = unstack(PARAMS["decoder"], DECODER.plan)
    for i in config.decoder.moe_layers:
        rng = jax.random.fold_in(jax.random.key(3), i)
        single = upcycle_layer(layers[i], config.decoder.moe, rng, noise)
        chex.assert_trees_all_equal(single, whole[i])


def test_slices_of_a_copy_are_adjacent_and_share_its_router_column():
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


def test_noise_of_the_configured_standard_deviation_differs_between_copies():
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
        # Which dimensions are dropped depends only on the rng.
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
