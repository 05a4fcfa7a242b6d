"""Token losses at supervised positions without an array of [positions, vocabulary].

1. Positions with a weight are moved to the front and split into chunks of C positions.
2. A loop over the chunks that have any contracts hidden states with the head, [C, D] x [V, D] ->
   [C, V], and applies the token function. Time falls with the share of supervised positions.
3. The gradient of a chunk is computed in the same iteration, while its logits exist. What is saved
   for the backward pass has the sizes of the hidden states and the head.

For T = 2,048 positions, V = 151,936 ids and C = 256, logits in float32 take 156 MB instead of
1.2 GB, for the student and the teacher each.

References:
  Liger kernel: https://arxiv.org/abs/2410.10989 (gradients in the forward pass).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from moddistill.distributed.sharding import is_distributed
from moddistill.models.chunks import (
    chosen_first,
    over_devices,
    restore_order,
    take_chunk,
    write_chunk,
)
from moddistill.models.logits import LogitInputs, masked_logits
from moddistill.models.vlm import Output
from moddistill.models.vocabulary import IdRanges
from moddistill.teachers.targets import NO_TARGETS, Targets

TokenFn = Callable[[Array, Targets, Array], dict[str, Array]]


def logit_inputs(output: Output) -> LogitInputs:
    """Returns the logit inputs of all `B * T` positions of a model's output."""
    return LogitInputs(output.hidden.reshape(-1, output.hidden.shape[-1]), output.head)


class _Positions(NamedTuple):
    """Arrays with a row for each position, which are sliced, reordered and sharded together."""

    hidden: Array
    targets: Any
    labels: Array
    weights: dict[str, Array]


class _Shared(NamedTuple):
    """Arrays that every chunk needs in full."""

    head: Array
    targets: Any


def chunked_token_loss(
    token_fn: TokenFn,
    inputs: LogitInputs,
    labels: Int[Array, "T"],
    weights: dict[str, Float[Array, "T"]],
    targets: Targets = NO_TARGETS,
    *,
    chunk_size: int,
    real_ids: IdRanges,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "T"]]]:
    """Returns `sum_n sum_t weights[n][t] * values[n][t]`, and the values of `token_fn`.

    The sum is differentiable in `inputs`; `targets` and `weights` get no gradient, and the values
    are for logging. Positions whose weights are all zero cost nothing and have the value 0.

    Args:
      token_fn: from the student's logits [C, V], the targets of these positions (`per_position`
        [C, ...], `shared` as it is) and labels [C] to an array [C] for each name in `weights`.
      chunk_size: number C of positions whose logits are in memory at one time.
      real_ids: ids that are tokens; the student's logits of all others are masked.
    """
    token_sum = functools.partial(_device_sum, token_fn, chunk_size, real_ids)
    if is_distributed():
        token_sum = over_devices(token_sum)
    positions = _Positions(inputs.hidden, targets.per_position, labels, weights)
    total, values = token_sum(positions, _Shared(inputs.head, targets.shared))
    # The last chunk is filled up with positions that have no weight, but a value.
    values = {name: jnp.where(weights[name] != 0, value, 0.0) for name, value in values.items()}
    return total, jax.lax.stop_gradient(values)


def _device_sum(token_fn, chunk_size, real_ids, positions, shared):
    chunk_size = min(chunk_size, len(positions.labels))
    return _sum(token_fn, chunk_size, real_ids, positions, shared)


# With z_t = h_t W^T masked and g_t = sum_n w_nt * d value_n(z_t) / d z_t, the sum S over all
# positions has the gradients
#   d S / d h_t = g_t W            [D], written into its row
#   d S / d W   = sum_t g_t^T h_t  [V, D], added up over the chunks in float32.
# S is a scalar, so its cotangent is one number: the forward pass computes both for the cotangent 1,
# and the backward pass scales them. Automatic differentiation of the loop would save the logits of
# all chunks or compute them twice (rematerialisation).
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum(token_fn, chunk_size, real_ids, positions, shared):
    value = functools.partial(_chunk_value, token_fn, real_ids)

    def body(i, carry):
        total, values = carry
        new, new_values = value(*_chunk(positions, shared, order, chunk_size, i))
        return total + new, write_chunk(values, new_values, i * chunk_size)

    order, num_chunks = chosen_first(_with_weight(positions.weights), chunk_size)
    start = (jnp.zeros((), jnp.float32), _zero_values(positions.weights, order))
    total, values = jax.lax.fori_loop(0, num_chunks, body, start)
    return total, restore_order(values, order, len(positions.labels))


def _sum_forward(token_fn, chunk_size, real_ids, positions, shared):
    # A frozen head needs no gradient, which would have its full size in float32.
    head_trains = shared.head.perturbed
    positions, shared = jax.tree.map(
        lambda x: x.value, (positions, shared), is_leaf=lambda x: hasattr(x, "perturbed")
    )
    hidden, head = positions.hidden, shared.head
    value = functools.partial(_chunk_value, token_fn, real_ids)
    gradient = jax.value_and_grad(value, argnums=(0, 1) if head_trains else (0,), has_aux=True)

    def body(i, carry):
        total, values, d_hidden, d_head = carry
        arguments = _chunk(positions, shared, order, chunk_size, i)
        (new, new_values), (d_chunk, *d_heads) = gradient(*arguments)
        if head_trains:
            d_head = d_head + d_heads[0].astype(jnp.float32)
        values, d_hidden = write_chunk((values, d_hidden), (new_values, d_chunk), i * chunk_size)
        return total + new, values, d_hidden, d_head

    order, num_chunks = chosen_first(_with_weight(positions.weights), chunk_size)
    start = (
        jnp.zeros((), jnp.float32),
        _zero_values(positions.weights, order),
        jnp.zeros((len(order), hidden.shape[1]), hidden.dtype),
        jnp.zeros(head.shape, jnp.float32) if head_trains else None,
    )
    total, values, d_hidden, d_head = jax.lax.fori_loop(0, num_chunks, body, start)
    values, d_hidden = restore_order((values, d_hidden), order, len(hidden))
    return (total, values), (d_hidden, d_head, jnp.zeros((), head.dtype))


def _sum_backward(token_fn, chunk_size, real_ids, residuals, cotangents):
    d_hidden, d_head, like_head = residuals
    scale = cotangents[0]  # values have none: the caller stops their gradient
    if isinstance(scale, SymbolicZero):
        return None, None
    if d_head is not None:
        d_head = (d_head * scale).astype(like_head.dtype)
    d_hidden = (d_hidden * scale).astype(d_hidden.dtype)
    return _Positions(d_hidden, None, None, None), _Shared(d_head, None)


_sum.defvjp(_sum_forward, _sum_backward, symbolic_zeros=True)


def _with_weight(weights: dict[str, Array]) -> Array:
    return functools.reduce(jnp.logical_or, [weight != 0 for weight in weights.values()])


def _chunk(positions, shared, order, chunk_size, i):
    """Arguments of `_chunk_value` for chunk i; rows past the end are zero and have no weight."""
    hidden, targets, labels, weights = take_chunk(positions, order, chunk_size, i)
    return hidden, shared.head, Targets(targets, shared.targets), labels, weights


def _chunk_value(token_fn, real_ids, hidden, head, targets, labels, weights):
    """Weighted sum over one chunk, and its values."""
    values = token_fn(masked_logits(hidden, head, real_ids), targets, labels)
    return sum(jnp.sum(weight * values[name]) for name, weight in weights.items()), values


def _zero_values(weights: dict[str, Array], order: Array) -> dict[str, Array]:
    return {name: jnp.zeros(len(order), jnp.float32) for name in weights}
