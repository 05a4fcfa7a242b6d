import jax.numpy as jnp
import numpy as np

from moddistill.losses.labels import next_token


def test_label_is_the_next_token_and_the_mask_is_shifted_with_it():
    tokens = jnp.asarray([[5, 6, 7, 8]])
    loss_mask = jnp.asarray([[True, False, True, True]])
    labels, supervised = next_token(tokens, loss_mask)
    # Position 1 predicts 7, position 2 predicts 8; token 5 has nothing before it.
    np.testing.assert_array_equal(supervised, [[False, True, True, False]])
    np.testing.assert_array_equal(labels[supervised], [7, 8])
