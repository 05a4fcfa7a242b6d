"""Router losses from statistics summed over the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moddistill.config import RouterLossConfig
from moddistill.losses import Metrics
from moddistill.models.moe.router import RouterStats


def balance_loss(stats: RouterStats) -> Float[Array, ""]:
    """`E * sum_e f_e P_e`, summed over layers: 1 a layer when balanced, E when collapsed.

    f_e is the share of tokens whose first choice is e, P_e the mean probability of e (Fedus et al.
    2021; DeepSpeed 0.9.5 `top2gating`). The reference also sums over layers, and in its d2s stage
    adds the result twice; here it counts once.
    """
    tokens = jnp.maximum(stats.tokens, 1.0)[:, None]
    share = stats.first / tokens
    prob = stats.prob / tokens
    return stats.first.shape[-1] * jnp.sum(share * prob)


def z_loss(stats: RouterStats) -> Float[Array, ""]:
    """Mean squared log-partition of the routers, summed over layers (Zoph et al. 2022)."""
    return jnp.sum(stats.z / jnp.maximum(stats.tokens, 1.0))


def add_router_losses(
    total: Array,
    metrics: Metrics,
    stats: RouterStats | None,
    config: RouterLossConfig,
    tokens: Float[Array, ""],
) -> tuple[Array, Metrics]:
    """A loss and its metrics with the router losses of a sparse model, added once.

    Args:
      tokens: real tokens of the whole batch, of which `stats` may have seen a part.
    """
    if stats is None:
        return total, metrics
    seen = stats.tokens[0]
    balance, z = balance_loss(stats), z_loss(stats)
    router = config.load_balance_weight * balance + config.z_weight * z
    total = total + router * (seen / jnp.maximum(tokens, 1.0))
    assigned = jnp.sum(stats.load) + jnp.sum(stats.dropped)
    new = {
        "balance": (balance / len(stats.tokens) * seen, seen),
        "dropped": (jnp.sum(stats.dropped), assigned),
    }
    return total, metrics | jax.lax.stop_gradient(new)
