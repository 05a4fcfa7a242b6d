import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import ExpertConfig
from moddistill.models.compute import ComputeConfig
from moddistill.models.moe.layer import MoE, check_moe
from moddistill.models.moe.router import top_k_routing
from tests.models import draw

MLP = 12


def moe(hidden, config, valid=None, is_image=None, params=None, dtype=jnp.float32):
    """The layer on [B, T, D], its statistics and its parameters."""
    valid = jnp.ones(hidden.shape[:2], bool) if valid is None else valid
    is_image = jnp.zeros(hidden.shape[:2], bool) if is_image is None else is_image
    layer = MoE(config=check_moe(config), intermediate_size=MLP, compute=ComputeConfig(dtype=dtype))
    if params is None:
        params = draw.params(layer, hidden, valid, is_image)
    output, stats = draw.apply(layer, params, hidden, valid, is_image)
    return np.asarray(output), stats, params


def moe_on_logits(logits, config, **kwargs):
    """The layer where hidden states are the router's logits, as its kernel is the identity."""
    hidden = jnp.asarray(logits, jnp.float32)
    layer = MoE(config=check_moe(config), intermediate_size=MLP, compute=ComputeConfig())
    flags = jnp.ones(hidden.shape[:2], bool)
    params = draw.params(layer, hidden, flags, flags) | {"router": jnp.eye(hidden.shape[-1])}
    return moe(hidden, config, params=params, **kwargs)


def feed_forward(x, gate, up, down):
    """SwiGLU of one vector, in float64."""
    x, gate, up, down = (np.asarray(array, np.float64) for array in (x, gate, up, down))
    a = x @ gate
    return (a / (1 + np.exp(-a)) * (x @ up)) @ down


def expert(x, params, e):
    return feed_forward(x, *(params[f"experts_{name}"][e] for name in ("gate", "up", "down")))


@pytest.mark.parametrize(
    ("top_k", "norm", "expected"),
    [
        (1, False, [0.5]),
        (1, True, [1]),
        (2, False, [0.5, 0.3]),
        (2, True, [0.625, 0.375]),  # 0.5 / 0.8, 0.3 / 0.8
        (4, True, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_weights_are_probabilities_over_their_sum_or_raw(top_k, norm, expected):
    experts, weights = top_k_routing(jnp.array([[0.3, 0.05, 0.5, 0.15]]), top_k, norm)
    np.testing.assert_array_equal(experts[0], [2, 0, 3, 1][:top_k])
    np.testing.assert_allclose(weights[0], expected, atol=1e-6)


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_the_only_choice_is_weighted_by_its_raw_probability(dispatch):
    config = ExpertConfig(2, 1, dispatch=dispatch, capacity_factor=2.0)
    logits = [[[np.log(3.0), 0.0], [0.0, 0.0]]]  # probabilities 3/4, 1/4 and 1/2, 1/2
    output, _, params = moe_on_logits(logits, config)
    np.testing.assert_allclose(output[0, 0], 0.75 * expert(logits[0][0], params, 0), atol=1e-5)
    np.testing.assert_allclose(output[0, 1], 0.5 * expert(logits[0][1], params, 0), atol=1e-5)


@pytest.mark.parametrize(("norm", "weight"), [(True, 1.0), (False, 0.75)])
def test_a_lone_survivor_has_weight_one_unless_weights_are_raw(norm, weight):
    # One slot, ceil(2 / 2 * 0.5 * 2), which the first choices take; both second ones are dropped.
    config = ExpertConfig(2, 2, norm_topk_prob=norm, dispatch="capacity", capacity_factor=0.5)
    logits = [[[np.log(3.0), 0.0], [0.0, np.log(3.0)]]]
    output, stats, params = moe_on_logits(logits, config)
    for i in range(2):
        np.testing.assert_allclose(
            output[0, i], weight * expert(logits[0][i], params, i), atol=1e-5
        )
    assert stats.dropped == 2
    np.testing.assert_array_equal(stats.load, [[1, 1], [0, 0]])


def test_a_token_that_loses_both_choices_gives_zero():
    # One slot, ceil(3 / 2 * 0.3 * 2): the first token takes it in both experts.
    config = ExpertConfig(2, 2, dispatch="capacity", capacity_factor=0.3)
    logits = [[[2.0, 1.0]] * 3]
    output, stats, params = moe_on_logits(logits, config)
    p = 1 / (1 + np.exp(-1.0))
    expected = p * expert([2.0, 1.0], params, 0) + (1 - p) * expert([2.0, 1.0], params, 1)
    np.testing.assert_allclose(output[0, 0], expected, atol=1e-5)
    assert np.all(output[0, 1:] == 0)
    assert stats.dropped == 4


def test_capacity_that_holds_everything_changes_nothing():
    hidden = draw.normal(2, 9, 8)
    ample = ExpertConfig(4, 2, dispatch="capacity", capacity_factor=4.0)
    dropless, _, params = moe(hidden, ExpertConfig(4, 2))
    capacity, stats, _ = moe(hidden, ample, params=params)
    np.testing.assert_allclose(capacity, dropless, atol=1e-6)
    assert stats.dropped == 0


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_padding_is_neither_routed_nor_counted(dispatch, top_k):
    config = ExpertConfig(4, top_k, dispatch=dispatch, capacity_factor=0.7)
    # All rows are one token, so that padding would compete with it for the same experts.
    hidden = jnp.tile(draw.normal(1, 1, 8), (3, 5, 1))
    valid = jnp.zeros((3, 5), bool).at[1, 2:].set(True).at[2, 0].set(True)
    output, stats, params = moe(hidden, config, valid)
    single, expected, _ = moe(hidden[valid][None], config, params=params)

    np.testing.assert_allclose(output[np.asarray(valid)], single[0], atol=1e-6)
    assert np.all(output[~np.asarray(valid)] == 0)
    for found, of_single in zip(*map(jax.tree.leaves, (stats, expected)), strict=True):
        np.testing.assert_allclose(found, of_single, atol=1e-5)
    assert stats.tokens == 4


def test_statistics_have_the_probabilities_of_tokens_only_on_request():
    hidden = draw.normal(2, 3, 8)
    _, stats, params = moe(hidden, ExpertConfig(4, 2))
    assert stats.token_probs is None
    compute = ComputeConfig(token_routing=True)
    layer = MoE(config=check_moe(ExpertConfig(4, 2)), intermediate_size=MLP, compute=compute)
    flags = jnp.ones((2, 3), bool)
    _, stats = draw.apply(layer, params, hidden, flags, flags)
    logits = hidden.reshape(6, 8) @ params["router"]
    np.testing.assert_allclose(stats.token_probs, jax.nn.softmax(logits), atol=1e-6)


def test_a_batch_of_padding_only_gives_zeros():
    for dispatch in ("dropless", "capacity"):
        config = ExpertConfig(4, 2, dispatch=dispatch)
        output, stats, _ = moe(draw.normal(1, 3, 8), config, jnp.zeros((1, 3), bool))
        assert np.all(output == 0)
        assert stats.tokens == 0 and stats.dropped == 0


@pytest.mark.parametrize("neighbours", [0, 1, 7])
def test_dropless_output_of_a_sample_does_not_depend_on_its_neighbours(neighbours):
    sample = draw.normal(1, 6, 8)
    single, _, params = moe(sample, ExpertConfig(4, 2))
    for seed in range(2):
        rows = jnp.concatenate([5 * draw.normal(neighbours, 6, 8, seed=10 + seed), sample])
        together, _, _ = moe(rows, ExpertConfig(4, 2), params=params)
        np.testing.assert_allclose(together[-1], single[0], atol=1e-6)


def test_with_capacity_an_earlier_sample_displaces_a_later_one():
    config = ExpertConfig(2, 1, dispatch="capacity", capacity_factor=1.0)
    token = [[1.0, 0.0]]
    output, _, params = moe_on_logits([token, token], config)  # one slot, ceil(2 / 2 * 1)
    assert np.any(output[0] != 0) and np.all(output[1] == 0)
    swapped, _, _ = moe(jnp.array([[[0.0, 1.0]], token]), config, params=params)
    assert np.any(swapped[1] != 0)


def test_the_residual_layer_is_blended_by_a_softmax():
    hidden = draw.normal(1, 4, 8)
    config = ExpertConfig(4, 2, residual=True)
    output, _, params = moe(hidden, config)
    experts = {name: x for name, x in params.items() if name.startswith(("experts", "router"))}
    mixed, _, _ = moe(hidden, ExpertConfig(4, 2), params=experts)
    kernels = [params["residual"][name]["kernel"] for name in ("gate", "up", "down")]
    for t in range(4):
        x = np.asarray(hidden[0, t], np.float64)
        share = np.exp(x @ np.asarray(params["blend"]) + np.asarray(params["blend_bias"]))
        share /= share.sum()
        expected = share[0] * mixed[0, t] + share[1] * feed_forward(x, *kernels)
        np.testing.assert_allclose(output[0, t], expected, atol=1e-5)


def test_routing_is_in_float32_whatever_the_dtype_of_the_model():
    hidden = draw.normal(2, 16, 8).astype(jnp.bfloat16)
    output, stats, params = moe(hidden, ExpertConfig(4, 2), dtype=jnp.bfloat16)
    _, expected, _ = moe(hidden.astype(jnp.float32), ExpertConfig(4, 2), params=params)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(stats.prob, expected.prob, atol=1e-5)
    np.testing.assert_array_equal(stats.load, expected.load)


def test_routing_is_deterministic():
    hidden = draw.normal(1, 5, 8)
    first, _, params = moe(hidden, ExpertConfig(4, 2))
    again, _, _ = moe(hidden, ExpertConfig(4, 2), params=params)
    np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize(("top_k", "given", "decided"), [
    (1, None, False), (2, None, True), (3, None, True), (1, True, True), (2, False, False)
])  # fmt: skip
def test_weights_are_renormalised_by_default_for_two_choices_or_more(top_k, given, decided):
    config = check_moe(ExpertConfig(4, top_k, norm_topk_prob=given))
    assert config.norm_topk_prob is decided


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"top_k": 5}, "top_k: expected 1 to moe.num_experts .4., got 5"),
        ({"top_k": 0}, "top_k: .*, got 0"),
        ({"num_experts": 0}, "moe.num_experts: expected 1 to 1,000, got 0"),
        ({"num_experts": 10**9}, "moe.num_experts: expected 1 to 1,000, got 1000000000"),
        ({"top_k": 10**9}, "moe.top_k: expected 1 to moe.num_experts .4., got 1000000000"),
        ({"capacity_factor": 0.0}, "moe.capacity_factor: expected > 0 and <= 1,000,000, got 0.0"),
        ({"capacity_factor": 1e7}, "moe.capacity_factor: expected > 0 .*, got 10000000.0"),
        ({"dispatch": "capcity"}, "'capcity'.*did you mean 'capacity'"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size: expected the width .*, got -1"),
    ],
)
def test_settings_without_a_meaning_are_named(changes, named):
    config = ExpertConfig()
    for name, value in changes.items():
        # Names that the annotations do not have are refused there, where tests check those.
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=named):
        check_moe(config)


def test_experts_have_a_width_of_their_own_and_the_residual_layer_that_of_the_dense_one():
    hidden = draw.normal(1, 6, 8)
    _, _, params = moe(hidden, ExpertConfig(4, 2, residual=True, moe_intermediate_size=3))
    assert params["experts_gate"].shape == params["experts_up"].shape == (4, 8, 3)
    assert params["experts_down"].shape == (4, 3, 8)
    assert params["residual"]["down"]["kernel"].shape == (MLP, 8)
