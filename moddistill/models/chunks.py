"""Chunks of chosen positions, so that an array of [positions, vocabulary] never exists.

1. Chosen positions are moved to the front and split into chunks of C positions.
2. A loop runs over the chunks that have any, so that time falls with the share of the chosen.
3. What it computes is written back to the positions' own places.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from moddistill.distributed.sharding import BATCH_AXES, MESH_AXES, is_distributed


def map_chunks(
    fn: Callable[[Any, Any], Any],
    chosen: Bool[Array, "T"],
    positions: Any,
    shared: Any,
    *,
    chunk_size: int,
) -> Any:
    """Returns `fn(positions[chunk], shared)` of all chosen positions; zeros at the others.

    Args:
      fn: from arrays `[C, ...]`, and `shared` as it is, to arrays `[C, ...]`.
      positions: pytree of arrays `[T, ...]`.
      shared: pytree of arrays that every chunk needs in full.
      chunk_size: number C of positions.
    """

    def on_device(part: Any, shared: Any) -> tuple[Array, Any]:
        chosen, positions = part
        size = min(chunk_size, len(chosen))
        order, count = chosen_first(chosen, size)

        def of_chunk(i: Array | int) -> Any:
            return fn(take_chunk(positions, order, size, i), shared)

        shapes = jax.eval_shape(of_chunk, 0)
        start = jax.tree.map(lambda x: jnp.zeros((len(order), *x.shape[1:]), x.dtype), shapes)
        found = jax.lax.fori_loop(
            0, count, lambda i, buffers: write_chunk(buffers, of_chunk(i), i * size), start
        )
        found = restore_order(found, order, len(chosen))
        # The last chunk is filled up with positions that are not chosen.
        return jnp.zeros(()), jax.tree.map(lambda x: _where(chosen, x), found)

    run = over_devices(on_device) if is_distributed() else on_device
    return run((chosen, positions), shared)[1]


def _where(chosen: Array, x: Array) -> Array:
    return jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))


def over_devices(on_device: Callable[[Any, Any], tuple[Any, Any]]) -> Callable:
    """Returns `on_device(positions, shared) -> (total, values)` over the devices of the mesh.

    Each device loops over as many chunks as its positions need, so there is no collective inside of
    the loop: shared arrays are all-gathered before it, and their gradients are summed once after it
    (the transpose of replication is `psum`). Totals are summed over devices.

    Positions are sharded over `tensor` too, unlike in the layers. Vocabulary shards would not do:
    teacher and student may be padded to different sizes, so that shard i of one does not have the
    ids of shard i of the other.
    """
    tensor_size = jax.sharding.get_abstract_mesh().shape["tensor"]
    by_position, replicated = PartitionSpec(BATCH_AXES, "tensor"), PartitionSpec()

    def body(positions: Any, shared: Any) -> tuple[Any, Any]:
        # A device has [T / devices, 1, ...]: all of its positions, one shard of axis 1.
        total, values = on_device(jax.tree.map(lambda x: x[:, 0], positions), shared)
        return jax.lax.psum(total, MESH_AXES), jax.tree.map(lambda x: x[:, None], values)

    def run(positions: Any, shared: Any) -> tuple[Any, Any]:
        # Round-robin over `tensor`, position t to shard t % tensor_size: supervised positions of a
        # sample are adjacent, and contiguous shards would leave most devices without any.
        split = jax.tree.map(lambda x: x.reshape(-1, tensor_size, *x.shape[1:]), positions)
        total, values = jax.shard_map(
            body,
            in_specs=(by_position, replicated),
            out_specs=(replicated, by_position),
            check_vma=False,
        )(split, shared)
        return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), values)

    return run


def chosen_first(chosen: Bool[Array, "T"], chunk_size: int) -> tuple[Int[Array, "N"], Array]:
    """Returns positions in an order that has the chosen first, and the number of chunks in use.

    The order is filled up to full chunks with indices past the end.
    """
    order = jnp.argsort(~chosen, stable=True)
    fill = -len(order) % chunk_size
    order = jnp.concatenate([order, len(order) + jnp.arange(fill)])
    return order, (jnp.sum(chosen) + chunk_size - 1) // chunk_size


def take_chunk(positions: Any, order: Int[Array, "N"], chunk_size: int, i: Array | int) -> Any:
    """Returns the rows of chunk i; those past the end are zero."""
    rows = jax.lax.dynamic_slice_in_dim(order, i * chunk_size, chunk_size)
    take = functools.partial(jnp.take, indices=rows, axis=0, mode="fill", fill_value=0)
    return jax.tree.map(take, positions)


def write_chunk(buffers: Any, chunks: Any, start: Array) -> Any:
    """Returns the buffers with each chunk written from row `start` on."""

    def write(buffer: Array, chunk: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(
            buffer, chunk.astype(buffer.dtype), start, axis=0
        )

    return jax.tree.map(write, buffers, chunks)


def restore_order(buffers: Any, order: Int[Array, "N"], length: int) -> Any:
    """Returns rows that are in the order of `order` at their original positions."""
    inverse = jnp.argsort(order)[:length]
    return jax.tree.map(lambda buffer: buffer[inverse], buffers)
