"""Labels of next-token prediction: the only place where tokens and masks are shifted."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def next_token(
    tokens: Int[Array, "B T"], loss_mask: Bool[Array, "B T"], segments: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Returns the label of each position, the token after it, and whether it is supervised.

    `loss_mask` marks tokens, so it is shifted with them. The last position of a sample has no
    label: what follows it is padding or another sample.

        tokens     5  6  7  8  9  4     labels      6  7  8  9  4  -
        segments   1  1  1  2  2  2
        loss_mask  1  0  1  1  0  1     supervised  0  1  0  0  1  0
    """
    labels, supervised, following = (jnp.roll(x, -1, axis=1) for x in (tokens, loss_mask, segments))
    inside = ((following == segments) & (segments > 0)).at[:, -1].set(False)
    return labels, supervised & inside
