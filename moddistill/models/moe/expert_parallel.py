"""Expert layers over several devices, without dropping a token.

Tokens are sharded over the batch axes of the mesh, experts over `expert`, their intermediate width
over `tensor`. Tokens reach their experts along `expert` by one of three collectives, with equal
results:

- `all_gather`: every device gathers all tokens, computes the assignments to its own experts, and
  the sums are reduce-scattered.
- `all_to_all`: a device receives the tokens that chose its experts, in buffers for the worst case,
  in which every token did; they are as large as those of `all_gather`.
- `ragged`: `all_to_all` without the unused part of the buffers, on backends that have the
  instruction (TPU and GPU).

In the bodies of `shard_map` below, T is the number of tokens of one device, E its experts, and n
the size of the axis `expert`. Kernels are sharded over `tensor` along F, so an expert's output is a
partial sum that `_mix_local` adds up with a psum.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moddistill.distributed.sharding import BATCH_AXES, is_distributed
from moddistill.models.moe.dispatch import assign_rows, expert_mixture
from moddistill.models.moe.grouped_matmul import Experts

_KERNELS = {
    "gate": PartitionSpec("expert", None, "tensor"),
    "up": PartitionSpec("expert", None, "tensor"),
    "down": PartitionSpec("expert", "tensor", None),
}


def mix_on_one_device(
    tokens: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    chosen: Int[Array, "T k"],
    keep: Bool[Array, "T k"],
    experts: Experts,
) -> Float[Array, "T D"]:
    """`sum_j weights[t, j] * expert_{chosen[t, j]}(tokens[t])` over the assignments to keep."""
    rows = assign_rows(chosen, keep, len(experts["gate"]))
    return expert_mixture(tokens, weights, experts, rows)


def mix_experts(
    tokens: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    chosen: Int[Array, "T k"],
    keep: Bool[Array, "T k"],
    experts: Experts,
    transport: str = "all_gather",
) -> Float[Array, "T D"]:
    """As `mix_on_one_device`, to rounding, over the devices of the mesh of the context."""
    if not is_distributed():
        return mix_on_one_device(tokens, weights, chosen, keep, experts)
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        {"all_gather": _by_all_gather, "all_to_all": _by_all_to_all, "ragged": _by_ragged}[
            transport
        ],
        in_specs=(rows, rows, rows, rows, _KERNELS),
        out_specs=rows,
        check_vma=False,
    )(tokens, weights, chosen, keep, experts)


def _by_all_gather(
    tokens: Array, weights: Array, chosen: Array, keep: Array, experts: Experts
) -> Array:
    # [T, D] to [n * T, D] on every device; each computes its experts' part of all n * T sums, and
    # reduce-scatter adds the n parts and returns to each device its own T.
    gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    mixed = _mix_local(*map(gather, (tokens, weights, chosen, keep)), experts)
    return jax.lax.psum_scatter(mixed, "expert", tiled=True).astype(tokens.dtype)


def _by_all_to_all(
    tokens: Array, weights: Array, chosen: Array, keep: Array, experts: Experts
) -> Array:
    def exchange(x: Array) -> Array:
        return jax.lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)

    # A buffer of T rows for each device: the tokens that chose its experts first, then the others,
    # whose assignments `_mix_local` ignores. `rank` inverts that order in the answers.
    destinations = _destinations(chosen, keep, len(experts["gate"]))
    order = jnp.argsort(~destinations, axis=1, stable=True)
    received = (exchange(x[order.reshape(-1)]) for x in (tokens, weights, chosen, keep))
    computed = exchange(_mix_local(*received, experts).astype(tokens.dtype))
    rank = jnp.argsort(order, axis=1) + jnp.arange(len(order))[:, None] * len(tokens)
    return _sum_over_devices(computed, rank, destinations)


def _by_ragged(
    tokens: Array, weights: Array, chosen: Array, keep: Array, experts: Experts
) -> Array:
    destinations = _destinations(chosen, keep, len(experts["gate"]))
    devices, count = destinations.shape
    most = count * min(chosen.shape[1], devices)  # rows that can be sent
    # Pairs (device, token), those to send first and ordered by device, so that the rows for one
    # device are contiguous.
    order = jnp.argsort(~destinations.reshape(-1), stable=True)
    token = order[:most] % count
    # sizes[s, r]: rows that device s sends to device r. In the send buffer of s they follow those
    # for devices before r, in the receive buffer of r those from devices before s.
    sizes = jax.lax.all_gather(jnp.sum(destinations, axis=1, dtype=jnp.int32), "expert")
    send_offsets = jnp.cumsum(sizes, axis=1) - sizes
    recv_offsets = jnp.cumsum(sizes, axis=0) - sizes
    my_index = jax.lax.axis_index("expert")

    def dispatch(x: Array) -> Array:
        empty = jnp.zeros((devices * count, *x.shape[1:]), x.dtype)
        return jax.lax.ragged_all_to_all(
            x,
            empty,
            input_offsets=send_offsets[my_index],
            send_sizes=sizes[my_index],
            output_offsets=recv_offsets[my_index],
            recv_sizes=sizes[:, my_index],
            axis_name="expert",
        )

    # The way back exchanges the roles of the two buffers.
    def combine(x: Array) -> Array:
        empty = jnp.zeros((most, *x.shape[1:]), x.dtype)
        return jax.lax.ragged_all_to_all(
            x,
            empty,
            input_offsets=recv_offsets[:, my_index],
            send_sizes=sizes[:, my_index],
            output_offsets=send_offsets[:, my_index],
            recv_sizes=sizes[my_index],
            axis_name="expert",
        )

    # The instruction has no booleans.
    inputs = (tokens, weights, chosen, keep.astype(jnp.int32))
    *received, kept = (dispatch(x[token]) for x in inputs)
    computed = combine(_mix_local(*received, kept > 0, experts).astype(tokens.dtype))
    rank = jnp.argsort(order).reshape(destinations.shape)
    return _sum_over_devices(computed, rank, destinations)


def _destinations(chosen: Array, keep: Array, local_experts: int) -> Array:
    """bool [n, T]: true where a device has an expert that the token chose."""
    devices = jnp.arange(jax.lax.axis_size("expert"))
    at = (chosen // local_experts)[None] == devices[:, None, None]
    return jnp.any(at & keep[None], axis=2)


def _mix_local(
    tokens: Array, weights: Array, chosen: Array, keep: Array, experts: Experts
) -> Array:
    """The part of this device's experts in the outputs of any tokens, float32."""
    local_experts = len(experts["gate"])
    chosen = chosen - jax.lax.axis_index("expert") * local_experts
    keep = keep & (chosen >= 0) & (chosen < local_experts)
    chosen = jnp.clip(chosen, 0, local_experts - 1)
    mixed = mix_on_one_device(tokens, weights, chosen, keep, experts)
    return jax.lax.psum(mixed.astype(jnp.float32), "tensor")


def _sum_over_devices(computed: Array, rank: Array, destinations: Array) -> Array:
    """Sums the answers for each token: row `rank[d, t]` from every device of its destinations."""
    rows = jnp.take(computed, rank, axis=0, mode="fill", fill_value=0)
    rows = jnp.where(destinations[..., None], rows.astype(jnp.float32), 0.0)
    return jnp.sum(rows, axis=0).astype(computed.dtype)
