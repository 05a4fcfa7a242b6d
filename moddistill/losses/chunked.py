"""Sums over supervised positions without ever holding [positions, vocabulary] logits.

Supervised positions are brought to the front and contracted with the head chunk by chunk, in a
loop that runs over the chunks in use alone: time falls with the supervised share, memory does not
depend on the number of positions. The gradient of a chunk is taken while its logits exist (Hsu et
al. 2024, Liger), which spares the second pass of rematerialisation over both heads.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moddistill.distributed.sharding import BATCH_AXES, MESH_AXES, is_distributed
from moddistill.models.vocabulary import IdRanges, token_mask

_MASKED = -1e30  # a logit that can never be chosen; finite, so that 0 * log 0 stays 0


class Heads(NamedTuple):
    """What logits are made of: the student's and, where a loss needs it, the teacher's.

    The teacher's two arrays get no gradient.
    """

    hidden: Float[Array, "T D"]
    head: Float[Array, "V D"]
    teacher_hidden: Float[Array, "T W"] | None = None
    teacher_head: Float[Array, "Y W"] | None = None


TokenFn = Callable[[Array, Array | None, Array], dict[str, Array]]


def next_token(
    tokens: Int[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The label of each position, which is the token after it, and whether it is supervised.

    `loss_mask` marks tokens, so it moves with them; the last position has no label. All losses
    shift here and nowhere else.
    """
    labels = jnp.roll(tokens, -1, axis=1)
    supervised = jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
    return labels, supervised


def rows(hidden: Float[Array, "B T D"]) -> Float[Array, "B*T D"]:
    """All positions of all samples, one after the other."""
    return hidden.reshape(-1, hidden.shape[-1])


def logits_of(
    hidden: Float[Array, "*T D"], head: Float[Array, "V D"], real_ids: IdRanges
) -> Float[Array, "*T V"]:
    """float32 logits; vocabulary rows outside `real_ids` can never be chosen."""
    logits = jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)
    return jnp.where(token_mask(real_ids, logits.shape[-1]), logits, _MASKED)


def weighted_sum(
    token_fn: TokenFn,
    heads: Heads,
    labels: Int[Array, "T"],
    weights: dict[str, Float[Array, "T"]],
    *,
    chunk: int,
    real_ids: IdRanges,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "T"]]]:
    """`sum_n sum_t weights[n][t] * value[n][t]`, and the values: `token_fn` at each position.

    The sum is differentiable in `heads.hidden` and `heads.head`; the values are for logging.
    Positions whose weights are all zero cost nothing and have the value 0.

    Args:
      token_fn: from student logits [C, V], teacher logits [C, V] or None and labels [C] to one
        array [C] for each name in `weights`.
      chunk: number of positions whose logits exist at one time.
      real_ids: ids that are tokens; rows of all others are masked on both sides.
    """
    summed = functools.partial(_device_sum, token_fn, chunk, real_ids)
    if is_distributed():
        summed = _over_devices(summed)
    total, values = summed(heads, labels, weights)
    # The last chunk is filled up with positions that do not count.
    values = {name: jnp.where(weights[name] != 0, value, 0.0) for name, value in values.items()}
    return total, jax.lax.stop_gradient(values)


def _device_sum(token_fn, chunk, real_ids, heads, labels, weights):
    rest = (heads.teacher_hidden, heads.teacher_head, labels, weights)
    chunk = min(chunk, len(labels))
    return _sum(token_fn, chunk, real_ids, heads.hidden, heads.head, rest)


def _over_devices(summed: Callable) -> Callable:
    """Each device sums over its own positions, as many chunks as it needs, with whole heads.

    The heads are gathered once, before the loop; their gradients are added up once, behind it.
    Positions are spread along `tensor` too: shards of two vocabularies with different padding would
    not meet each other. They are dealt out in turn, since the supervised ones of a sample lie
    together.
    """
    hands = jax.sharding.get_abstract_mesh().shape["tensor"]
    dealt, whole = PartitionSpec(BATCH_AXES, "tensor"), PartitionSpec()

    def share(*arguments: Any) -> tuple[Array, Any]:
        total, values = summed(*_of_positions(lambda x: x[:, 0], *arguments))
        return jax.lax.psum(total, MESH_AXES), jax.tree.map(lambda x: x[:, None], values)

    def over(*arguments: Any) -> tuple[Array, Any]:
        total, values = jax.shard_map(
            share,
            in_specs=(Heads(dealt, whole, dealt, whole), dealt, dealt),
            out_specs=(whole, dealt),
            check_vma=False,
        )(*_of_positions(lambda x: x.reshape(-1, hands, *x.shape[1:]), *arguments))
        return total, jax.tree.map(lambda x: x.reshape(-1), values)

    return over


def _of_positions(change: Callable, heads: Heads, labels: Array, weights: Any) -> tuple[Any, ...]:
    """The same arguments of a sum, all arrays of positions changed."""
    arrays = (heads.hidden, heads.teacher_hidden, labels, weights)
    hidden, teacher_hidden, *rest = jax.tree.map(change, arrays)
    return heads._replace(hidden=hidden, teacher_hidden=teacher_hidden), *rest


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum(token_fn, chunk, real_ids, hidden, head, rest):
    value = functools.partial(_chunk_value, token_fn, real_ids)

    def body(i, carry):
        total, values = carry
        new, new_values = value(*_chunk_arguments(order, chunk, i, hidden, head, rest))
        return total + new, _write(values, new_values, i * chunk)

    order, used = _order(rest[-1], chunk)
    start = (jnp.zeros((), jnp.float32), _empty_values(rest[-1], order))
    total, values = jax.lax.fori_loop(0, used, body, start)
    return total, _restore(values, order, len(hidden))


def _sum_forward(token_fn, chunk, real_ids, hidden, head, rest):
    head_trains = head.perturbed
    hidden, head = hidden.value, head.value
    rest = jax.tree.map(lambda x: x.value, rest, is_leaf=lambda x: hasattr(x, "perturbed"))
    value = functools.partial(_chunk_value, token_fn, real_ids)
    gradient = jax.value_and_grad(value, argnums=(0, 1) if head_trains else (0,), has_aux=True)

    def body(i, carry):
        total, values, d_hidden, d_head = carry
        arguments = _chunk_arguments(order, chunk, i, hidden, head, rest)
        (new, new_values), (d_chunk, *d_heads) = gradient(*arguments)
        if head_trains:
            d_head = d_head + d_heads[0].astype(jnp.float32)
        values, d_hidden = _write((values, d_hidden), (new_values, d_chunk), i * chunk)
        return total + new, values, d_hidden, d_head

    order, used = _order(rest[-1], chunk)
    start = (
        jnp.zeros((), jnp.float32),
        _empty_values(rest[-1], order),
        jnp.zeros((len(order), hidden.shape[1]), hidden.dtype),
        jnp.zeros(head.shape, jnp.float32) if head_trains else None,
    )
    total, values, d_hidden, d_head = jax.lax.fori_loop(0, used, body, start)
    values, d_hidden = _restore((values, d_hidden), order, len(hidden))
    return (total, values), (d_hidden, d_head, jnp.zeros((), head.dtype))


def _sum_backward(token_fn, chunk, real_ids, residuals, cotangent):
    d_hidden, d_head, like = residuals
    scale = cotangent[0]
    if isinstance(scale, SymbolicZero):
        return None, None, None
    if d_head is not None:
        d_head = (d_head * scale).astype(like.dtype)
    return (d_hidden * scale).astype(d_hidden.dtype), d_head, None


_sum.defvjp(_sum_forward, _sum_backward, symbolic_zeros=True)


def _empty_values(weights: dict[str, Array], order: Array) -> dict[str, Array]:
    return {name: jnp.zeros(len(order), jnp.float32) for name in weights}


def _write(buffers: Any, chunks: Any, start: Array) -> Any:
    """Each chunk written into its buffer from row `start` on."""

    def write(buffer: Array, chunk: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(
            buffer, chunk.astype(buffer.dtype), start, axis=0
        )

    return jax.tree.map(write, buffers, chunks)


def _restore(buffers: Any, order: Array, length: int) -> Any:
    """Rows in the order of `order` put back where they came from."""
    place = jnp.argsort(order)[:length]
    return jax.tree.map(lambda buffer: buffer[place], buffers)


def _order(weights: dict[str, Array], chunk: int) -> tuple[Array, Array]:
    """Positions with any weight first, in whole chunks (filled up with an index past the end)."""
    used = functools.reduce(jnp.logical_or, [weight != 0 for weight in weights.values()])
    order = jnp.argsort(~used, stable=True)
    fill = -len(order) % chunk
    order = jnp.concatenate([order, len(order) + jnp.arange(fill)])
    return order, (jnp.sum(used) + chunk - 1) // chunk


def _chunk_arguments(order, chunk, i, hidden, head, rest):
    """The i-th chunk's rows; rows past the end are zero and weigh nothing."""
    teacher_hidden, teacher_head, labels, weights = rest
    rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
    take = functools.partial(jnp.take, indices=rows, axis=0, mode="fill", fill_value=0)
    return (
        take(hidden),
        head,
        None if teacher_hidden is None else take(teacher_hidden),
        teacher_head,
        take(labels),
        {name: take(weight) for name, weight in weights.items()},
    )


def _chunk_value(token_fn, real_ids, hidden, head, teacher_hidden, teacher_head, labels, weights):
    logits = logits_of(hidden, head, real_ids)
    teacher_logits = None
    if teacher_hidden is not None:
        teacher_logits = logits_of(teacher_hidden, teacher_head, real_ids)
        width = min(logits.shape[1], teacher_logits.shape[1])
        logits, teacher_logits = logits[:, :width], teacher_logits[:, :width]
    values = token_fn(logits, teacher_logits, labels)
    return sum(jnp.sum(weight * values[name]) for name, weight in weights.items()), values
