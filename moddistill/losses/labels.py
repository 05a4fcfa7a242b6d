"""Labels of next-token prediction: the only place where tokens and masks are shifted."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def next_token(
    tokens: Int[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Returns the label of each position, the token after it, and whether it is supervised.

    `loss_mask` marks tokens, so it is shifted with them; the last position has no label.

        tokens     5  6  7  8        labels      6  7  8  -
        loss_mask  1  0  1  1        supervised  0  1  1  0
    """
    labels = jnp.roll(tokens, -1, axis=1)
    supervised = jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
    return labels, supervised
