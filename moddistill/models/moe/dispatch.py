"""Dropless expert dispatch: assignments sorted by expert, padded to whole blocks of rows.

1. Each kept assignment (token t, choice j) gets a row. Rows are ordered by expert, and those of
   each expert are padded to whole blocks: at most `assignments / block + E`, a static number.
2. Tokens are gathered into rows, and `grouped_matmul` applies each block's expert.
3. Outputs are gathered back to [T, k] and summed with the router weights.

With E = 2 experts, blocks of 2 rows and choices `[[0], [1], [0], [0]]`, the blocks hold tokens
(0, 2), (3, -) of expert 0 and (1, -) of expert 1.

The gradient is written by hand for two reasons. It keeps g and u of the forward pass, so that both
passes together take nine matmuls per row. And a gather's transpose would be a scatter-add, which is
slow on TPUs; since `row` and `source` are inverse to each other, the backward pass gathers too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from moddistill.models.layers import MATMUL
from moddistill.models.moe import grouped_matmul
from moddistill.models.moe.grouped_matmul import Experts

_LARGEST_BLOCK = 512


class ExpertAssignment(NamedTuple):
    """The row of each assignment of a token to an expert, and the assignment of each row.

    Attributes:
      row: row of each assignment; G * C, one past the last row, for dropped ones.
      source: assignment (token * k + choice) of each row of each block; T * k in padding rows.
      blocks: number of blocks of each expert; they are ordered by expert, from row 0 on.
    """

    row: Int[Array, "T k"]
    source: Int[Array, "G C"]
    blocks: Int[Array, "E"]


def block_size(assignments: int, num_experts: int) -> int:
    """Rows of a block: a power of two from 8 to 512, at or above an eighth of the mean load.

    An expert's last block is half empty on average, so a sixteenth to an eighth of the computed
    rows is padding.
    """
    eighth = max(1, assignments // num_experts // 8)
    return min(_LARGEST_BLOCK, max(8, 1 << (eighth - 1).bit_length()))


def assign_rows(
    experts: Int[Array, "T k"], keep: Bool[Array, "T k"], num_experts: int
) -> ExpertAssignment:
    """Sorts the kept assignments by expert and pads each expert's rows to whole blocks.

    The kept choices of one token are different experts.
    """
    assignments = experts.size
    most = len(experts) * min(experts.shape[1], num_experts)  # assignments that can be kept
    block = block_size(most, num_experts)
    rows = (most // block + num_experts) * block
    expert = jnp.where(keep, experts, num_experts).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    counts = jnp.bincount(expert, length=num_experts + 1)[:num_experts]
    blocks = (counts + block - 1) // block
    # Within its expert, the n-th assignment gets the n-th row. Dropped assignments count as expert
    # E, whose appended entry is one past the last row.
    first_row = jnp.append((jnp.cumsum(blocks) - blocks) * block, rows)
    first_rank = jnp.append(jnp.cumsum(counts) - counts, 0)
    sorted_expert = expert[order]
    sorted_row = first_row[sorted_expert] + jnp.arange(assignments) - first_rank[sorted_expert]
    sorted_row = jnp.minimum(sorted_row, rows)
    # `order` and `sorted_row` make `row` and `source`, which are inverse to each other.
    row = jnp.zeros(assignments, jnp.int32).at[order].set(sorted_row.astype(jnp.int32))
    source = jnp.full(rows, assignments, jnp.int32).at[sorted_row].set(order, mode="drop")
    return ExpertAssignment(
        row.reshape(experts.shape), source.reshape(-1, block), blocks.astype(jnp.int32)
    )


@jax.custom_vjp
def expert_mixture(
    hidden: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    experts: Experts,
    rows: ExpertAssignment,
) -> Float[Array, "T D"]:
    """`sum_j weights[t, j] * expert_{e(t, j)}(hidden[t])`, in the dtype of `hidden`.

    The weights are applied to the experts' outputs in float32.
    """
    return _forward(hidden, weights, experts, rows)[0]


def _forward(hidden, weights, experts, rows):
    tokens = _take(hidden, rows.source // weights.shape[1])
    outputs, gate, up = grouped_matmul.forward(tokens, experts, rows.blocks)
    gate, up = checkpoint_name(gate, MATMUL), checkpoint_name(up, MATMUL)
    outputs = _by_assignment(outputs, rows)
    mixed = jnp.einsum("TkD,Tk->TD", outputs, weights.astype(jnp.float32))
    return mixed.astype(hidden.dtype), (hidden, weights, experts, rows, gate, up)


def _backward(residuals, cotangent):
    # mixed[t] = sum_j weights[t, j] * y(t, j): the cotangent of every y(t, j) is that of mixed[t],
    # times a weight that `grouped_matmul.backward` applies. Padding rows gather zeros.
    hidden, weights, experts, rows, gate, up = residuals
    token = rows.source // weights.shape[1]
    scales = _take(weights.reshape(-1), rows.source).astype(jnp.float32)
    d_tokens, d_scales, d_experts = grouped_matmul.backward(
        _take(hidden, token), scales, _take(cotangent, token), gate, up, experts, rows.blocks
    )
    # A token was gathered into k rows, so its gradient is their sum.
    return (
        jnp.sum(_by_assignment(d_tokens, rows), axis=1).astype(hidden.dtype),
        _take(d_scales.reshape(-1), rows.row).astype(weights.dtype),
        jax.tree.map(lambda new, x: new.astype(x.dtype), d_experts, experts),
        None,
    )


expert_mixture.defvjp(_forward, _backward)


def _by_assignment(computed, rows):
    """Rows [G, C, D] in the order of assignments [T, k, D], float32; zeros for dropped ones."""
    return _take(computed.reshape(-1, computed.shape[-1]), rows.row).astype(jnp.float32)


def _take(x, index):
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)
