"""Expert layers over several devices, without dropping a token.

Tokens are spread over the batch axes of the mesh, experts over `expert`, their inner width over
`tensor`. Rows travel along `expert` by one of three transports with equal results:

- `all_gather`: devices gather each other's tokens, each computes the assignments to its own
  experts, and the sums are scattered back.
- `all_to_all`: each device is sent the tokens that chose its experts, in buffers for the worst
  case, that all of them did; so they are as large as what `all_gather` gathers.
- `ragged`: the same without the empty part of the buffers, where the backend has the instruction
  (TPU and GPU).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moddistill.distributed.sharding import BATCH_AXES, is_distributed
from moddistill.models.moe.dispatch import expert_mixture, sort_rows
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
    rows = sort_rows(chosen, keep, len(experts["gate"]))
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
    gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    mixed = _mix_here(*map(gather, (tokens, weights, chosen, keep)), experts)
    return jax.lax.psum_scatter(mixed, "expert", tiled=True).astype(tokens.dtype)


def _by_all_to_all(
    tokens: Array, weights: Array, chosen: Array, keep: Array, experts: Experts
) -> Array:
    def exchange(x: Array) -> Array:
        return jax.lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)

    wanted = _wanted(chosen, keep, len(experts["gate"]))
    order = jnp.argsort(~wanted, axis=1, stable=True)
    sent = (exchange(x[order.reshape(-1)]) for x in (tokens, weights, chosen, keep))
    computed = exchange(_mix_here(*sent, experts).astype(tokens.dtype))
    rank = jnp.argsort(order, axis=1) + jnp.arange(len(order))[:, None] * len(tokens)
    return _sum_of_devices(computed, rank, wanted)


def _by_ragged(
    tokens: Array, weights: Array, chosen: Array, keep: Array, experts: Experts
) -> Array:
    wanted = _wanted(chosen, keep, len(experts["gate"]))
    devices, count = wanted.shape
    most = count * min(chosen.shape[1], devices)  # rows that can be sent
    order = jnp.argsort(~wanted.reshape(-1), stable=True)
    token = order[:most] % count
    # sizes[s, r]: rows that device s sends to device r
    sizes = jax.lax.all_gather(jnp.sum(wanted, axis=1, dtype=jnp.int32), "expert")
    behind = jnp.cumsum(sizes, axis=1) - sizes  # where the sender's rows lie
    before = jnp.cumsum(sizes, axis=0) - sizes  # where the receiver's rows lie
    me = jax.lax.axis_index("expert")

    def there(x: Array) -> Array:
        empty = jnp.zeros((devices * count, *x.shape[1:]), x.dtype)
        return jax.lax.ragged_all_to_all(
            x, empty, behind[me], sizes[me], before[me], sizes[:, me], axis_name="expert"
        )

    def back(x: Array) -> Array:
        empty = jnp.zeros((most, *x.shape[1:]), x.dtype)
        return jax.lax.ragged_all_to_all(
            x, empty, before[:, me], sizes[:, me], behind[:, me], sizes[me], axis_name="expert"
        )

    *sent, kept = (there(x[token]) for x in (tokens, weights, chosen, keep.astype(jnp.int32)))
    computed = back(_mix_here(*sent, kept > 0, experts).astype(tokens.dtype))
    return _sum_of_devices(computed, jnp.argsort(order).reshape(wanted.shape), wanted)


def _wanted(chosen: Array, keep: Array, here: int) -> Array:
    """[devices, T] whether a device has an expert that the token chose."""
    devices = jnp.arange(jax.lax.axis_size("expert"))
    at = (chosen // here)[None] == devices[:, None, None]
    return jnp.any(at & keep[None], axis=2)


def _mix_here(tokens: Array, weights: Array, chosen: Array, keep: Array, experts: Experts) -> Array:
    """What this device's experts give for any tokens, float32."""
    here = len(experts["gate"])
    chosen = chosen - jax.lax.axis_index("expert") * here
    keep = keep & (chosen >= 0) & (chosen < here)
    mixed = mix_on_one_device(tokens, weights, jnp.clip(chosen, 0, here - 1), keep, experts)
    return jax.lax.psum(mixed.astype(jnp.float32), "tensor")


def _sum_of_devices(computed: Array, rank: Array, wanted: Array) -> Array:
    """Adds up what devices sent back for each token: row `rank[d, t]` where `wanted[d, t]`."""
    rows = jnp.take(computed, rank, axis=0, mode="fill", fill_value=0)
    rows = jnp.where(wanted[..., None], rows.astype(jnp.float32), 0.0)
    return jnp.sum(rows, axis=0).astype(computed.dtype)
