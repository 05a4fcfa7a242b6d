import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.losses.router import balance_loss, z_loss
from moddistill.models.moe.router import RouterStats, capacity_slots, router_stats, within_capacity


@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "factor", "slots"),
    [
        (16, 4, 2, 1.5, 12),  # 4 * 3
        (10, 4, 2, 1.5, 8),  # 2.5 * 3 = 7.5
        (10, 4, 1, 1.0, 3),  # 2.5
        (7, 2, 1, 1.5, 6),  # 3.5 * 1.5 = 5.25
        (8, 4, 2, 0.5, 2),  # 2 * 1
        (5, 8, 1, 1.0, 1),  # 0.625
        (9, 4, 3, 2.0, 14),  # 2.25 * 6 = 13.5
        (0, 4, 2, 1.5, 0),
        (18, 3, 2, 1.25, 15),  # 6 * 2.5, which constant folding may round up
        (25, 5, 2, 1.5, 15),  # 5 * 3
    ],
)
def test_an_expert_has_its_share_of_slots_times_factor_and_choices(
    tokens, num_experts, top_k, factor, slots
):
    compiled = jax.jit(capacity_slots, static_argnums=(1, 2, 3))
    assert compiled(jnp.float32(tokens), num_experts, top_k, factor) == slots


def fits(experts, slots, num_experts=2, valid=None):
    experts = jnp.array(experts, jnp.int32)
    valid = jnp.ones(len(experts), bool) if valid is None else jnp.array(valid)
    return within_capacity(experts, valid, num_experts, jnp.float32(slots)).tolist()


# First choices give both experts two tokens; second choices follow in places 2 and 3.
CROSSED = [[0, 1], [0, 1], [1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        (0, [[False, False]] * 4),
        (1, [[True, False], [False, False], [True, False], [False, False]]),
        (2, [[True, False]] * 4),
        (3, [[True, True], [True, False], [True, True], [True, False]]),
        (4, [[True, True]] * 4),
    ],
)
def test_first_choices_come_before_second_ones_and_then_earlier_tokens(slots, expected):
    assert fits(CROSSED, slots) == expected


def test_a_second_choice_comes_after_first_choices_of_later_tokens():
    # Token 0 asks for expert 1 second, tokens 1 and 2 ask for it first.
    assert fits([[0, 1], [1, 0], [1, 0]], 2) == [[True, False], [True, True], [True, False]]


def test_an_expert_that_dropped_a_first_choice_takes_no_second_one():
    # Expert 0 is the first choice of three tokens and drops one; token 3 asks for it second.
    assert fits([[0, 1], [0, 1], [0, 1], [1, 0]], 2) == [
        [True, True],  # place 1 of expert 1, behind token 3
        [True, False],
        [False, False],
        [True, False],
    ]


def test_third_choices_come_last():
    # All three experts are in demand from all tokens; expert 2 first by token 1 only.
    experts = [[0, 1, 2], [2, 0, 1]]
    assert fits(experts, 1, num_experts=3) == [[True, True, False], [True, False, False]]


def test_padding_takes_no_slot():
    padded = fits([[0, 1], [0, 1], [0, 1]], 1, valid=[False, True, True])
    assert padded == [[False, False], [True, True], [False, False]]


def statistics():
    """Three text tokens, an image token and padding on two experts; one choice was dropped."""
    probs = jnp.array([[0.75, 0.25], [0.75, 0.25], [0.4, 0.6], [0.9, 0.1], [0.01, 0.99]])
    logits = jnp.log(probs) + jnp.array([[0.0], [1.0], [2.0], [3.0], [9.0]])
    experts = jnp.argsort(-probs, axis=-1).astype(jnp.int32)
    valid = jnp.array([True, True, True, True, False])
    keep = jnp.tile(valid[:, None], (1, 2)).at[1, 1].set(False)
    is_image = jnp.array([False, False, False, True, False])
    return router_stats(logits, experts, keep, valid, is_image)


def test_statistics_are_sums_over_the_valid_tokens():
    stats = statistics()
    np.testing.assert_array_equal(stats.first, [3, 1])
    np.testing.assert_allclose(stats.prob, [2.8, 1.2], atol=1e-6)
    np.testing.assert_allclose(stats.z, 0 + 1 + 4 + 9, atol=1e-5)
    assert stats.tokens == 4


def test_load_counts_what_was_computed_apart_for_text_and_image_tokens():
    stats = statistics()
    np.testing.assert_array_equal(stats.load, [[3, 2], [1, 1]])
    assert stats.dropped == 1
    assert stats.load.sum() + stats.dropped == 2 * stats.tokens


def layers(first, prob, tokens, z=0.0):
    """Statistics of layers that saw `tokens` tokens each."""
    first, prob = jnp.array(first, jnp.float32), jnp.array(prob, jnp.float32)
    count = len(first)
    return RouterStats(
        first=first,
        prob=prob,
        z=jnp.full(count, z),
        load=jnp.zeros((count, 2, first.shape[1])),
        dropped=jnp.zeros(count),
        tokens=jnp.full(count, tokens, jnp.float32),
    )


@pytest.mark.parametrize("num_layers", [1, 3])
def test_balance_loss_is_one_a_layer_for_a_uniform_router(num_layers):
    stats = layers([[2, 2, 2, 2]] * num_layers, [[2, 2, 2, 2]] * num_layers, tokens=8)
    np.testing.assert_allclose(balance_loss(stats), num_layers, atol=1e-6)


def test_balance_loss_is_the_number_of_experts_for_a_collapsed_router():
    np.testing.assert_allclose(balance_loss(layers([[8, 0, 0]], [[8, 0, 0]], 8)), 3, atol=1e-6)


def test_balance_loss_adds_layers():
    # 2 * (3/4 * 2.4/4 + 1/4 * 1.6/4) = 1.1 and 2 * (1/2 * 1/4 + 1/2 * 3/4) = 1.
    stats = layers([[3, 1], [2, 2]], [[2.4, 1.6], [1, 3]], tokens=4)
    np.testing.assert_allclose(balance_loss(stats), 2.1, atol=1e-6)


def test_balance_loss_of_a_batch_is_that_of_its_summed_statistics():
    # Two halves, each collapsed on another expert, are balanced together: 2 * (1/2 * 1/2) * 2.
    halves = [layers([[4, 0]], [[4, 0]], 4), layers([[0, 4]], [[0, 4]], 4)]
    whole = jax.tree.map(jnp.add, *halves)
    np.testing.assert_allclose(balance_loss(whole), 1, atol=1e-6)


def test_balance_loss_pushes_probability_away_from_the_expert_that_gets_more():
    gradient = jax.grad(lambda prob: balance_loss(layers([[3, 1]], prob, 4)))(jnp.ones((1, 2)))
    # d/dP_e of E * f_e * P_e / tokens = 2 * f_e / 4
    np.testing.assert_allclose(gradient, [[2 * 0.75 / 4, 2 * 0.25 / 4]], atol=1e-6)


def test_z_loss_is_a_mean_over_tokens_and_a_sum_over_layers():
    np.testing.assert_allclose(z_loss(layers([[1, 1]] * 3, [[1, 1]] * 3, 2, z=8.0)), 12)


def test_a_batch_without_tokens_has_no_router_loss():
    stats = layers([[0, 0]], [[0, 0]], 0)
    assert balance_loss(stats) == 0 and z_loss(stats) == 0
