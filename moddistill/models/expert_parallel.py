"""Expert layers over several devices, without dropping a token.

Tokens are spread over the batch axes of the mesh, experts over `expert`, their inner width over
`tensor`. Along `expert` the devices gather each other's tokens, each computes the assignments to
its own experts, and the sums are scattered back: two collectives of known size, however the router
decides.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moddistill.models.dispatch import expert_mixture, sort_rows
from moddistill.models.grouped import Experts
from moddistill.sharding import BATCH_AXES, is_distributed

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
) -> Float[Array, "T D"]:
    """As `mix_on_one_device`, to rounding, over the devices of the mesh of the context."""
    if not is_distributed():
        return mix_on_one_device(tokens, weights, chosen, keep, experts)
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        _compute_share,
        in_specs=(rows, rows, rows, rows, _KERNELS),
        out_specs=rows,
        check_vma=False,
    )(tokens, weights, chosen, keep, experts)


def _compute_share(
    tokens: Array, weights: Array, chosen: Array, keep: Array, experts: Experts
) -> Array:
    """One device's tokens, with its experts and its part of their width."""
    gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    tokens, weights, chosen, keep = (gather(x) for x in (tokens, weights, chosen, keep))
    here = len(experts["gate"])
    chosen = chosen - jax.lax.axis_index("expert") * here
    keep = keep & (chosen >= 0) & (chosen < here)
    mixed = mix_on_one_device(tokens, weights, jnp.clip(chosen, 0, here - 1), keep, experts)
    mixed = jax.lax.psum(mixed.astype(jnp.float32), "tensor")
    mixed = jax.lax.psum_scatter(mixed, "expert", tiled=True)
    return mixed.astype(tokens.dtype)
