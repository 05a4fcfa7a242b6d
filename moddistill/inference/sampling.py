"""Choice of the next token: greedy, or sampled as `transformers` does."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moddistill.errors import invalid

# Beyond these, quotients of logits overflow float32, or no longer differ.
_COLDEST, _HOTTEST = 1e-4, 1e4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the choice of the next token, applied in this order.

    Attributes:
      repetition_penalty: divides the positive and multiplies the negative logits of tokens of the
        prompt and of the answer so far (Keskar et al. 2019); 1 for none.
      temperature: divides the logits; 0 is greedy, which the settings below do not change.
      top_k: samples from this many most probable tokens; 0 for all.
      top_p: samples from the smallest set of tokens with this probability.
      min_p: samples from tokens of at least this share of the largest probability.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not 0 < self.repetition_penalty <= _HOTTEST:
            expected = f"> 0 and <= {_HOTTEST:g}"
            raise invalid("repetition_penalty", self.repetition_penalty, expected)
        if not self.temperature >= 0:
            raise invalid("temperature", self.temperature, ">= 0")
        if self.temperature and not _COLDEST <= self.temperature <= _HOTTEST:
            expected = f"0, or {_COLDEST:g} to {_HOTTEST:g}"
            raise invalid("temperature", self.temperature, expected)
        if not self.top_k >= 0:
            raise invalid("top_k", self.top_k, ">= 0")
        if not 0 < self.top_p <= 1:
            raise invalid("top_p", self.top_p, "> 0 and <= 1")
        if not 0 <= self.min_p <= 1:
            raise invalid("min_p", self.min_p, ">= 0 and <= 1")

    @property
    def penalises(self) -> bool:
        """Whether the choice depends on the tokens so far."""
        return self.repetition_penalty != 1


def choose_tokens(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    rngs: Array,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, "B"]:
    """Returns the next token of each row.

    Args:
      rngs: a key for each row; equal keys and logits give equal tokens.
      seen: the tokens of each row so far, if these are penalised.
    """
    if sampling.penalises:
        penalty = sampling.repetition_penalty
        penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(seen, penalised, logits)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    if sampling.top_p < 1:
        logits = jnp.where(logits >= _top_p_threshold(logits, sampling.top_p), logits, -jnp.inf)
    if sampling.min_p:
        threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(rngs, logits).astype(jnp.int32)


def _top_p_threshold(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B 1"]:
    """The smallest logit of the set; by value, since ties with it stay in."""
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered)
    # Probability of all tokens with larger logits. A token is in the set if this is below top_p;
    # for the most probable token it is 0, so the set is never empty.
    cumulative = jnp.cumsum(probabilities, axis=-1) - probabilities
    in_set = jnp.where(cumulative < top_p, ordered, jnp.inf)
    return jnp.min(in_set, axis=-1, keepdims=True)
