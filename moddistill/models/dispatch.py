"""Dropless expert computation: rows sorted by expert, in blocks of one expert each.

Every expert's rows are padded to whole blocks, so at most `assignments / block + E` blocks exist
and shapes stay static; a loop runs over the blocks in use alone. The gradient is written out: each
block is recomputed, weight gradients accumulate in float32, and all permutations, forward and
backward, are gathers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

Experts = dict[str, Array]  # gate [E, D, F], up [E, D, F], down [E, F, D]
_LARGEST_BLOCK = 128


class Blocks(NamedTuple):
    """Where each assignment of a token to an expert lies in the block buffer.

    Attributes:
      row: [T, k] row of the assignment; M, one past the last row, where nothing is computed.
      source: [M] the assignment (token * k + choice) in each row; T * k in rows that hold none.
      expert: [M / block] the expert of each block.
      used: number of blocks that hold any row.
    """

    row: Int[Array, "T k"]
    source: Int[Array, "M"]
    expert: Int[Array, "G"]
    used: Int[Array, ""]


def block_size(assignments: int, num_experts: int) -> int:
    """A power of two from 8 to 128, near the mean number of rows an expert gets."""
    mean = max(1, assignments // num_experts)
    return min(_LARGEST_BLOCK, max(8, 1 << (mean - 1).bit_length()))


def assign_blocks(experts: Int[Array, "T k"], keep: Bool[Array, "T k"], num_experts: int) -> Blocks:
    """Sorts the kept assignments by expert and pads each expert's rows to whole blocks."""
    assignments = experts.size
    block = block_size(assignments, num_experts)
    num_blocks = assignments // block + num_experts
    rows = num_blocks * block
    expert = jnp.where(keep, experts, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    counts = jnp.bincount(expert, length=num_experts + 1)[:num_experts]
    blocks_of = (counts + block - 1) // block
    block_end = jnp.cumsum(blocks_of)
    # Appended entries serve the dropped assignments, which sort behind all experts.
    first_row = jnp.append((block_end - blocks_of) * block, rows)
    first_rank = jnp.append(jnp.cumsum(counts) - counts, 0)
    sorted_expert = expert[order]
    sorted_row = first_row[sorted_expert] + jnp.arange(assignments) - first_rank[sorted_expert]
    sorted_row = jnp.minimum(sorted_row, rows)
    row = jnp.zeros(assignments, jnp.int32).at[order].set(sorted_row.astype(jnp.int32))
    source = jnp.full(rows, assignments, jnp.int32).at[sorted_row].set(order, mode="drop")
    block_expert = jnp.searchsorted(block_end, jnp.arange(num_blocks), side="right")
    return Blocks(
        row.reshape(experts.shape),
        source,
        jnp.minimum(block_expert, num_experts - 1).astype(jnp.int32),
        block_end[-1].astype(jnp.int32),
    )


@jax.custom_vjp
def expert_mixture(
    hidden: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    experts: Experts,
    blocks: Blocks,
) -> Float[Array, "T D"]:
    """`sum_j weights[t, j] * expert_{e(t, j)}(hidden[t])`, in the dtype of `hidden`.

    The weights are applied to the experts' outputs in float32.
    """
    return _forward(hidden, weights, experts, blocks)[0]


def _forward(hidden, weights, experts, blocks):
    tokens, scales = _gather_rows(hidden, weights, blocks)

    def body(i, out):
        y = _block_output(_slice(tokens, i), _slice(scales, i), _pick(experts, blocks.expert[i]))
        return out.at[i].set(y.astype(out.dtype))

    rows = jax.lax.fori_loop(0, blocks.used, body, jnp.zeros_like(tokens))
    return _gather_back(rows, blocks.row).astype(hidden.dtype), (hidden, weights, experts, blocks)


def _backward(residuals, cotangent):
    hidden, weights, experts, blocks = residuals
    tokens, scales = _gather_rows(hidden, weights, blocks)
    top_k = weights.shape[1]
    outer = _take(cotangent, blocks.source // top_k).reshape(tokens.shape)

    def body(i, carry):
        d_tokens, d_scales, d_experts = carry
        e = blocks.expert[i]
        _, pull = jax.vjp(_block_output, _slice(tokens, i), _slice(scales, i), _pick(experts, e))
        d_token, d_scale, d_expert = pull(_slice(outer, i).astype(jnp.float32))
        d_experts = jax.tree.map(
            lambda total, new: total.at[e].add(new.astype(total.dtype)), d_experts, d_expert
        )
        return d_tokens.at[i].set(d_token), d_scales.at[i].set(d_scale), d_experts

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), experts)
    start = (jnp.zeros_like(tokens), jnp.zeros_like(scales), zeros)
    d_tokens, d_scales, d_experts = jax.lax.fori_loop(0, blocks.used, body, start)
    d_weights = jnp.append(d_scales.reshape(-1), 0.0)[blocks.row]
    d_experts = jax.tree.map(lambda new, x: new.astype(x.dtype), d_experts, experts)
    return (
        _gather_back(d_tokens, blocks.row).astype(hidden.dtype),
        d_weights.astype(weights.dtype),
        d_experts,
        None,
    )


expert_mixture.defvjp(_forward, _backward)


def _block_output(tokens, scales, expert):
    """One expert's weighted output for one block, float32."""
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    gate = product("CD,DF->CF", tokens, expert["gate"]).astype(tokens.dtype)
    up = product("CD,DF->CF", tokens, expert["up"]).astype(tokens.dtype)
    return scales[:, None] * product("CF,FD->CD", nn.silu(gate) * up, expert["down"])


def _gather_rows(hidden, weights, blocks):
    """Tokens [G, block, D] and their weights [G, block] in block order; zeros where no row is."""
    num_blocks = blocks.expert.shape[0]
    tokens = _take(hidden, blocks.source // weights.shape[1])
    scales = _take(weights.reshape(-1), blocks.source).astype(jnp.float32)
    return tokens.reshape(num_blocks, -1, hidden.shape[1]), scales.reshape(num_blocks, -1)


def _gather_back(rows, row):
    """Sums the rows [G, block, D] of each token's assignments, in float32."""
    flat = rows.reshape(-1, rows.shape[-1])
    return jnp.sum(_take(flat, row).astype(jnp.float32), axis=1)


def _take(x, index):
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _slice(x, i):
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _pick(experts, expert):
    return jax.tree.map(lambda x: _slice(x, expert), experts)
