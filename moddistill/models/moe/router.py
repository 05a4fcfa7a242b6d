"""Routing: top-k choice, capacity and statistics."""

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class RouterStats:
    """Sums over the valid tokens of the batch; stacked over layers they have a leading axis.

    Attributes:
      first: tokens whose first choice is each expert.
      prob: router probabilities.
      z: squared log-partition of the router, the router z-loss.
      load: assignments that each expert computed, of text tokens and of image tokens.
      dropped: assignments beyond an expert's capacity.
      tokens: number of valid tokens.
    """

    first: Float[Array, "*R E"]
    prob: Float[Array, "*R E"]
    z: Float[Array, "*R"]
    load: Float[Array, "*R M E"]
    dropped: Float[Array, "*R"]
    tokens: Float[Array, "*R"]


def choose(
    probs: Float[Array, "T E"], top_k: int, norm_topk_prob: bool
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """The `top_k` likeliest experts of each token and their weights, likeliest first.

    Weights are the probabilities, divided by their sum over the chosen if `norm_topk_prob`.
    """
    weights, experts = jax.lax.top_k(probs, top_k)
    return experts, _normalise(weights) if norm_topk_prob else weights


def _normalise(weights: Float[Array, "T k"]) -> Float[Array, "T k"]:
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.maximum(total, jnp.finfo(weights.dtype).eps)


def capacity_slots(
    tokens: Float[Array, ""], num_experts: int, top_k: int, factor: float
) -> Float[Array, ""]:
    """Slots of an expert: `ceil(tokens / num_experts * factor * top_k)` (DeepSpeed 0.9.5)."""
    # The last factor keeps a product that should be whole from being rounded to just above it.
    return jnp.ceil(tokens * (factor * top_k) / num_experts * (1 - 1e-6))


def within_capacity(
    experts: Int[Array, "T k"], valid: Bool[Array, "T"], num_experts: int, slots: Float[Array, ""]
) -> Bool[Array, "T k"]:
    """Which choices find a slot: all first choices come before all second ones, then token order.

    An expert that is full stays full: whatever comes later in this order is dropped. Padding
    (`valid` False) takes no slot.
    """
    line = jax.nn.one_hot(experts.T.reshape(-1), num_experts, dtype=jnp.int32)
    line = line * jnp.tile(valid, experts.shape[1])[:, None]
    place = jnp.sum((jnp.cumsum(line, axis=0) - 1) * line, axis=-1)
    fits = slots > place.reshape(experts.shape[1], -1).T
    return fits & valid[:, None]


def router_stats(
    logits: Float[Array, "T E"],
    experts: Int[Array, "T k"],
    keep: Bool[Array, "T k"],
    valid: Bool[Array, "T"],
    is_image: Bool[Array, "T"],
) -> RouterStats:
    """Sums of what the balance loss, the z-loss and the report need, over valid tokens."""
    num_experts = logits.shape[-1]
    weight = valid.astype(jnp.float32)
    kept = keep.astype(jnp.float32)
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32)
    assigned = jnp.einsum("TkE,Tk->TE", chosen, kept)
    modality = jnp.stack([~is_image, is_image]).astype(jnp.float32)
    return RouterStats(
        first=jnp.einsum("TE,T->E", chosen[:, 0], weight),
        prob=jnp.einsum("TE,T->E", jax.nn.softmax(logits), weight),
        z=jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * weight),
        load=jnp.einsum("MT,TE->ME", modality, assigned),
        dropped=jnp.sum(weight) * experts.shape[1] - jnp.sum(kept),
        tokens=jnp.sum(weight),
    )
