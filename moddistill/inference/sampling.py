"""The next token of each row: greedy, or sampled with temperature and top-p."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moddistill.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Greedy for temperature 0; otherwise the smallest set of tokens of probability `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; accepted: 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; accepted: above 0, at most 1")


def choose_token(
    logits: Float[Array, "B V"], sampling: Sampling, rng: jax.Array
) -> Int[Array, "B"]:
    """The next token of each row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    ordered = -jnp.sort(-logits, axis=-1)
    before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
    # The likeliest token always stays, since nothing is before it.
    floor = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    kept = jnp.where(logits >= floor, logits, -jnp.inf)
    return jax.random.categorical(rng, kept).astype(jnp.int32)
