"""Dropless expert computation: rows sorted by expert, each expert's filled up to whole blocks.

Shapes are static: at most `assignments / block + E` blocks exist. The gradient is written out: it
reads the two inner products of the forward pass instead of making them again, so that both passes
together take nine products a row, and all permutations, forward and backward, are gathers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moddistill.models.layers import PRODUCT
from moddistill.models.moe import grouped_matmul
from moddistill.models.moe.grouped_matmul import Experts

_LARGEST_BLOCK = 512


class Rows(NamedTuple):
    """Where each assignment of a token to an expert lies among the rows that are computed.

    Attributes:
      row: [T, k] row of the assignment; G * C, one past the last row, where nothing is computed.
      source: [G, C] the assignment (token * k + choice) in each row of each block; T * k in rows
        that hold none.
      blocks: [E] number of blocks of each expert, which lie one after the other from row 0 on.
    """

    row: Int[Array, "T k"]
    source: Int[Array, "G C"]
    blocks: Int[Array, "E"]


def block_size(assignments: int, num_experts: int) -> int:
    """Rows of a block: a power of two from 8 to 512, at or above an eighth of the mean load.

    An expert's last block is half empty on average, so a sixteenth to an eighth of what is computed
    belongs to nobody.
    """
    eighth = max(1, assignments // num_experts // 8)
    return min(_LARGEST_BLOCK, max(8, 1 << (eighth - 1).bit_length()))


def sort_rows(experts: Int[Array, "T k"], keep: Bool[Array, "T k"], num_experts: int) -> Rows:
    """Sorts the kept assignments by expert and fills each expert's rows up to whole blocks.

    The kept choices of one token are different experts.
    """
    assignments = experts.size
    most = len(experts) * min(experts.shape[1], num_experts)  # that can be kept
    block = block_size(most, num_experts)
    rows = (most // block + num_experts) * block
    expert = jnp.where(keep, experts, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    counts = jnp.bincount(expert, length=num_experts + 1)[:num_experts]
    blocks = (counts + block - 1) // block
    # Appended entries serve the dropped assignments, which sort behind all experts.
    first_row = jnp.append((jnp.cumsum(blocks) - blocks) * block, rows)
    first_rank = jnp.append(jnp.cumsum(counts) - counts, 0)
    sorted_expert = expert[order]
    sorted_row = first_row[sorted_expert] + jnp.arange(assignments) - first_rank[sorted_expert]
    sorted_row = jnp.minimum(sorted_row, rows)
    row = jnp.zeros(assignments, jnp.int32).at[order].set(sorted_row.astype(jnp.int32))
    source = jnp.full(rows, assignments, jnp.int32).at[sorted_row].set(order, mode="drop")
    return Rows(row.reshape(experts.shape), source.reshape(-1, block), blocks.astype(jnp.int32))


@jax.custom_vjp
def expert_mixture(
    hidden: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    experts: Experts,
    rows: Rows,
) -> Float[Array, "T D"]:
    """`sum_j weights[t, j] * expert_{e(t, j)}(hidden[t])`, in the dtype of `hidden`.

    The weights are applied to the experts' outputs in float32.
    """
    return _forward(hidden, weights, experts, rows)[0]


def _forward(hidden, weights, experts, rows):
    tokens = _take(hidden, rows.source // weights.shape[1])
    outputs, *inner = grouped_matmul.forward(tokens, experts, rows.blocks)
    gate, up = (checkpoint_name(x, PRODUCT) for x in inner)
    mixed = jnp.einsum("TkD,Tk->TD", _of_assignments(outputs, rows), weights.astype(jnp.float32))
    return mixed.astype(hidden.dtype), (hidden, weights, experts, rows, gate, up)


def _backward(residuals, cotangent):
    hidden, weights, experts, rows, gate, up = residuals
    token = rows.source // weights.shape[1]
    scales = _take(weights.reshape(-1), rows.source).astype(jnp.float32)
    d_tokens, d_scales, d_experts = grouped_matmul.backward(
        _take(hidden, token), scales, _take(cotangent, token), gate, up, experts, rows.blocks
    )
    return (
        jnp.sum(_of_assignments(d_tokens, rows), axis=1).astype(hidden.dtype),
        _take(d_scales.reshape(-1), rows.row).astype(weights.dtype),
        jax.tree.map(lambda new, x: new.astype(x.dtype), d_experts, experts),
        None,
    )


expert_mixture.defvjp(_forward, _backward)


def _of_assignments(computed, rows):
    """Rows [G, C, D] in the order of assignments [T, k, D], float32; zeros where none was."""
    return _take(computed.reshape(-1, computed.shape[-1]), rows.row).astype(jnp.float32)


def _take(x, index):
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)
