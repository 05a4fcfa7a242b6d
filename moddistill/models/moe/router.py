"""The router: logits, top-k choice of experts, capacity and statistics."""

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
      token_probs: router probabilities of each token, padding too; only with `token_routing`.
    """

    first: Float[Array, "*R E"]
    prob: Float[Array, "*R E"]
    z: Float[Array, "*R"]
    load: Float[Array, "*R M E"]
    dropped: Float[Array, "*R"]
    tokens: Float[Array, "*R"]
    token_probs: Float[Array, "*R T E"] | None = None


def router_logits(tokens: Float[Array, "T D"], kernel: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """Logits of all experts for each token; float32 throughout, since bfloat16 flips near ties."""
    return jnp.einsum("TD,DE->TE", tokens.astype(jnp.float32), kernel.astype(jnp.float32))


def top_k_routing(
    probs: Float[Array, "T E"], top_k: int, norm_topk_prob: bool
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """Each token's `top_k` most probable experts in descending order, and their weights.

    Weights are the probabilities, divided by their sum over these experts if `norm_topk_prob`.
    """
    weights, experts = jax.lax.top_k(probs, top_k)
    return experts, normalise(weights) if norm_topk_prob else weights


def normalise(weights: Float[Array, "T k"]) -> Float[Array, "T k"]:
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.maximum(total, jnp.finfo(weights.dtype).eps)


def capacity_slots(
    tokens: Float[Array, ""], num_experts: int, top_k: int, factor: float
) -> Float[Array, ""]:
    """Slots of an expert: `ceil(tokens / num_experts * factor * top_k)` (DeepSpeed 0.9.5)."""
    # The last factor undoes rounding above a product that is a whole number.
    return jnp.ceil(tokens * (factor * top_k) / num_experts * (1 - 1e-6))


def within_capacity(
    experts: Int[Array, "T k"], valid: Bool[Array, "T"], num_experts: int, slots: Float[Array, ""]
) -> Bool[Array, "T k"]:
    """Marks the assignments that find a slot: first choices before second ones, in token order.

    Later assignments to a full expert are dropped. Padding (`valid` False) takes no slot.
    """
    # All assignments in the order of priority, [k * T, E], one-hot in their expert. The cumulative
    # sum counts an expert's assignments so far, so an assignment's position in it is one less.
    assignments = jax.nn.one_hot(experts.T.reshape(-1), num_experts, dtype=jnp.int32)
    assignments = assignments * jnp.tile(valid, experts.shape[1])[:, None]
    position_in_expert = jnp.sum((jnp.cumsum(assignments, axis=0) - 1) * assignments, axis=-1)
    fits = slots > position_in_expert.reshape(experts.shape[1], -1).T
    return fits & valid[:, None]


def router_stats(
    logits: Float[Array, "T E"],
    experts: Int[Array, "T k"],
    keep: Bool[Array, "T k"],
    valid: Bool[Array, "T"],
    is_image: Bool[Array, "T"],
) -> RouterStats:
    """Sums over valid tokens for the balance loss, the z-loss and the report."""
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
