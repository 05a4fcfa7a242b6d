import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moddistill.models.moe.dispatch import assign_rows, block_size, expert_mixture
from tests.models import draw

WIDTH, MLP = 6, 10

# tokens, experts, choices, experts that are ever chosen, share of assignments that is kept
CASES = [
    (1, 1, 1, 1, 1.0),
    (5, 4, 2, 4, 1.0),
    (40, 4, 2, 4, 0.6),
    (33, 3, 3, 3, 1.0),
    (64, 8, 1, 2, 1.0),
    (70, 8, 3, 4, 0.5),
    (300, 2, 2, 2, 0.9),
    (150, 4, 1, 1, 1.0),
    (9, 4, 2, 4, 0.0),
]


def routing(tokens, num_experts, top_k, chosen, kept, seed=0):
    """Different random experts for each token, and which of the choices are kept."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(num_experts)[:chosen]
    experts = np.stack([rng.permutation(names)[:top_k] for _ in range(tokens)])
    return jnp.asarray(experts, jnp.int32), jnp.asarray(rng.random((tokens, top_k)) < kept)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kept_assignment_has_a_row_of_its_own_in_a_block_of_its_expert(case):
    num_experts = case[1]
    experts, keep = routing(*case)
    rows = jax.jit(assign_rows, static_argnums=2)(experts, keep, num_experts)
    row, source, blocks = (np.asarray(x) for x in rows)
    block = block_size(len(experts) * min(experts.shape[1], num_experts), num_experts)
    flat_row, flat_keep = row.reshape(-1), np.asarray(keep).reshape(-1)
    flat_source = source.reshape(-1)

    assert source.shape[1] == block
    np.testing.assert_array_equal(flat_row[~flat_keep], source.size)
    np.testing.assert_array_equal(flat_source[flat_row[flat_keep]], np.flatnonzero(flat_keep))
    assert np.sum(source < experts.size) == flat_keep.sum()
    assert np.all(source[source >= experts.size] == experts.size)
    expert_of_block = np.repeat(np.arange(num_experts), blocks)
    np.testing.assert_array_equal(
        expert_of_block[flat_row[flat_keep] // block], np.asarray(experts).reshape(-1)[flat_keep]
    )
    counts = np.bincount(np.asarray(experts)[np.asarray(keep)], minlength=num_experts)
    np.testing.assert_array_equal(blocks, -(-counts // block))
    assert np.sum(blocks) <= len(source)


def test_rows_of_an_expert_keep_the_order_of_the_tokens_and_fill_blocks_from_the_front():
    # 3 tokens, 2 choices, 2 experts: blocks of 8, of which 6 // 8 + 2 = 2 can be in use.
    experts = jnp.array([[1, 0], [0, 1], [1, 0]], jnp.int32)
    keep = jnp.array([[True, True], [True, False], [True, True]])
    rows = assign_rows(experts, keep, 2)
    # Expert 0 has assignments 1 (token 0), 2 (token 1), 5 (token 2); expert 1 has 0 and 4.
    np.testing.assert_array_equal(rows.row, [[8, 0], [1, 16], [9, 2]])
    np.testing.assert_array_equal(rows.source, [[1, 2, 5] + [6] * 5, [0, 4] + [6] * 6])
    np.testing.assert_array_equal(rows.blocks, [1, 1])


def test_rows_suffice_for_experts_of_which_a_token_has_one_here():
    """Of two choices at most one is kept when there is one expert: half of the rows."""
    experts = jnp.zeros((64, 2), jnp.int32)
    keep = jnp.arange(2)[None] == jnp.arange(64)[:, None] % 2
    rows = assign_rows(experts, keep, 1)
    assert rows.source.shape == (9, 8)
    np.testing.assert_array_equal(rows.blocks, [8])


@pytest.mark.parametrize(
    ("assignments", "num_experts", "expected"),
    [
        (1, 1, 8),
        (64, 8, 8),
        (575, 8, 8),
        (576, 8, 16),
        (2048, 4, 64),
        (16384, 4, 512),
        (99999, 4, 512),
    ],
)
def test_blocks_are_the_power_of_two_at_or_above_an_eighth_of_the_mean_load(
    assignments, num_experts, expected
):
    assert block_size(assignments, num_experts) == expected


@pytest.mark.parametrize("assignments", [2048, 8224, 16384, 32768])
def test_padding_rows_add_at_most_a_quarter(assignments):
    """Where each expert's last block holds one row; kernels are multiplied with whole blocks."""
    computed = assignments + 4 * (block_size(assignments, 4) - 1)
    assert computed <= 1.25 * assignments


def dense_mixture(hidden, weights, kernels, experts, keep):
    """Every expert on every token, combined by weights that are zero for what was not chosen."""
    gate = jnp.einsum("TD,EDF->TEF", hidden, kernels["gate"])
    up = jnp.einsum("TD,EDF->TEF", hidden, kernels["up"])
    out = jnp.einsum("TEF,EFD->TED", nn.silu(gate) * up, kernels["down"])
    chosen = jax.nn.one_hot(experts, kernels["gate"].shape[0])
    return jnp.einsum("Tk,TkE,TED->TD", weights * keep, chosen, out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_those_of_all_experts_on_all_tokens(case):
    tokens, num_experts, top_k = case[:3]
    experts, keep = routing(*case)
    kernels = {
        "gate": draw.normal(num_experts, WIDTH, MLP, seed=2) / 2,
        "up": draw.normal(num_experts, WIDTH, MLP, seed=3) / 2,
        "down": draw.normal(num_experts, MLP, WIDTH, seed=4) / 3,
    }
    inputs = (draw.normal(tokens, WIDTH), jnp.abs(draw.normal(tokens, top_k, seed=5)), kernels)
    outer = draw.normal(tokens, WIDTH, seed=6)

    def by_rows(*inputs):
        return expert_mixture(*inputs, assign_rows(experts, keep, num_experts))

    def by_all(*inputs):
        return dense_mixture(*inputs, experts, keep)

    def output_and_gradients(function):
        def weighted(*inputs):
            output = function(*inputs)
            return jnp.sum(output * outer), output

        grad = jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)
        (_, output), gradients = jax.jit(grad)(*inputs)
        return output, gradients

    chex.assert_trees_all_close(
        output_and_gradients(by_rows), output_and_gradients(by_all), atol=1e-5, rtol=1e-5
    )


def test_an_expert_without_tokens_has_no_gradient():
    experts, keep = jnp.array([[0], [2]], jnp.int32), jnp.ones((2, 1), bool)
    kernels = {name: draw.normal(3, 4, 4) for name in ("gate", "up", "down")}

    def total(kernels):
        rows = assign_rows(experts, keep, 3)
        return jnp.sum(expert_mixture(draw.normal(2, 4), jnp.ones((2, 1)), kernels, rows))

    for gradient in jax.jit(jax.grad(total))(kernels).values():
        assert np.all(gradient[1] == 0)
        assert np.all(np.abs(gradient[jnp.array([0, 2])]).sum((1, 2)) > 0)


def test_half_precision_inputs_give_half_precision_outputs_and_gradients():
    experts, keep = jnp.array([[0, 1], [1, 0]], jnp.int32), jnp.ones((2, 2), bool)
    half = jnp.bfloat16
    kernels = {name: draw.normal(2, 4, 4).astype(half) for name in ("gate", "up", "down")}
    hidden, weights = draw.normal(2, 4).astype(half), jnp.full((2, 2), 0.5)

    def total(hidden, weights, kernels):
        output = expert_mixture(hidden, weights, kernels, assign_rows(experts, keep, 2))
        assert output.dtype == half
        return jnp.sum(output.astype(jnp.float32))

    gradients = jax.jit(jax.grad(total, (0, 1, 2)))(hidden, weights, kernels)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, (hidden, weights, kernels))
