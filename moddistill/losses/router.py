"""Auxiliary losses of routers, from statistics summed over tokens and stacked over layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moddistill.config import RouterLossConfig
from moddistill.losses import Metrics
from moddistill.models.moe.router import RouterStats


def balance_loss(stats: RouterStats) -> Float[Array, ""]:
    """Load-balance loss `E * sum_e f_e P_e`, summed over layers.

    f_e is the fraction of tokens whose first choice is expert e, P_e the mean probability of e. A
    layer adds 1 if its E experts are balanced (f_e = P_e = 1/E), and E if one gets all tokens.
    Gradients flow through P_e only. The reference code also sums over layers, and in its d2s stage
    adds the result twice.

    References:
      Switch Transformer, equation 4: https://arxiv.org/abs/2101.03961; DeepSpeed 0.9.5,
      `top2gating`.
    """
    tokens = jnp.maximum(stats.tokens, 1.0)[:, None]
    fraction = stats.first / tokens
    prob = stats.prob / tokens
    return stats.first.shape[-1] * jnp.sum(fraction * prob)


def z_loss(stats: RouterStats) -> Float[Array, ""]:
    """Mean of `logsumexp(router logits) ** 2` over tokens, summed over layers.

    References:
      ST-MoE, equation 5: https://arxiv.org/abs/2202.08906.
    """
    return jnp.sum(stats.z / jnp.maximum(stats.tokens, 1.0))


def add_router_losses(
    loss: Array,
    metrics: Metrics,
    stats: RouterStats | None,
    config: RouterLossConfig,
    total_tokens: Float[Array, ""],
) -> tuple[Array, Metrics]:
    """Returns a loss and its metrics with those of the routers of a sparse model.

    Router losses are not sums over tokens. A micro-batch counts in proportion to its n_k of the N
    tokens, so that the sum over micro-batches is their weighted mean, sum_k (n_k / N) router_k.

    Args:
      stats: of one micro-batch; None for a dense model.
      total_tokens: N, real tokens of the global batch.
    """
    if stats is None:
        return loss, metrics
    tokens = stats.tokens[0]
    balance, z = balance_loss(stats), z_loss(stats)
    router = config.load_balance_weight * balance + config.z_weight * z
    loss = loss + router * (tokens / jnp.maximum(total_tokens, 1.0))
    assignments = jnp.sum(stats.load) + jnp.sum(stats.dropped)
    new = {
        "balance": (balance / len(stats.tokens) * tokens, tokens),
        "dropped": (jnp.sum(stats.dropped), assignments),
    }
    return loss, metrics | jax.lax.stop_gradient(new)
