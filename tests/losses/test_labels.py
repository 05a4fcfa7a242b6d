import jax.numpy as jnp
import numpy as np

from moddistill.losses.labels import next_token


def test_label_is_the_next_token_and_the_mask_is_shifted_with_it():
    tokens = jnp.asarray([[5, 6, 7, 8]])
    loss_mask = jnp.asarray([[True, False, True, True]])
    labels, supervised = next_token(tokens, loss_mask, jnp.ones((1, 4), jnp.int32))
    # Position 1 predicts 7, position 2 predicts 8; token 5 has nothing before it.
    np.testing.assert_array_equal(supervised, [[False, True, True, False]])
    np.testing.assert_array_equal(labels[supervised], [7, 8])


def test_no_label_is_of_another_segment():
    """Of three samples with padding between and after them, every token is supervised."""
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0, 4, 4, 0]])
    tokens = jnp.arange(10)[None]
    labels, supervised = next_token(tokens, jnp.ones((1, 10), bool), segments)
    np.testing.assert_array_equal(labels[supervised], [1, 2, 4, 8])
