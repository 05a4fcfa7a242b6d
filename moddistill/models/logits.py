"""Logits from hidden states and the head, over the ids that are tokens."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moddistill.models.vocabulary import IdRanges, token_mask

MASKED = -1e30


class LogitInputs(NamedTuple):
    """The two factors of a model's logits."""

    hidden: Float[Array, "T D"]
    head: Float[Array, "V D"]


def masked_logits(
    hidden: Float[Array, "*T D"], head: Float[Array, "V D"], real_ids: IdRanges
) -> Float[Array, "*T V"]:
    """float32 logits; those outside `real_ids` are -1e30, so that their probability is 0.

    The value is finite because of KL terms `p * log p`: 0 * -1e30 is 0, while 0 * -inf is NaN.
    """
    logits = jnp.einsum("...D,VD->...V", hidden, head, preferred_element_type=jnp.float32)
    return jnp.where(token_mask(real_ids, logits.shape[-1]), logits, MASKED)
