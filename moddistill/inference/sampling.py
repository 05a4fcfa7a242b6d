"""Greedy and random (temperature, top-p) choice of the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moddistill.errors import invalid

# Beyond these, quotients of logits overflow float32, or no longer differ.
_COLDEST, _HOTTEST = 1e-4, 1e4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the choice of the next token.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_p: samples from the smallest set of tokens with this probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise invalid("temperature", self.temperature, ">= 0")
        if self.temperature and not _COLDEST <= self.temperature <= _HOTTEST:
            expected = f"0, or {_COLDEST:g} to {_HOTTEST:g}"
            raise invalid("temperature", self.temperature, expected)
        if not 0 < self.top_p <= 1:
            raise invalid("top_p", self.top_p, "> 0 and <= 1")


def choose_token(
    logits: Float[Array, "B V"], sampling: Sampling, rng: jax.Array
) -> Int[Array, "B"]:
    """Returns the next token of each row; equal `rng` and logits give equal tokens."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered)
    # Probability of all tokens with larger logits. A token is in the set if this is below top_p;
    # for the most probable token it is 0, so the set is never empty.
    cumulative = jnp.cumsum(probabilities, axis=-1) - probabilities
    in_set = jnp.where(cumulative < sampling.top_p, ordered, jnp.inf)
    threshold = jnp.min(in_set, axis=-1, keepdims=True)
    # By value instead of rank, which needs no inverse of the sort; ties with the threshold stay in.
    return jax.random.categorical(rng, jnp.where(logits >= threshold, logits, -jnp.inf)).astype(
        jnp.int32
    )
