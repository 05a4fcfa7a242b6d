import jax.numpy as jnp
import numpy as np

from moddistill.losses.router import balance_loss, z_loss
from moddistill.models.moe.router import RouterStats


def stats(first, prob, z=(0.0,)):
    """Statistics over 8 tokens a layer."""
    first, prob = jnp.asarray(first, jnp.float32), jnp.asarray(prob, jnp.float32)
    layers, experts = first.shape
    return RouterStats(
        first=first,
        prob=prob,
        z=jnp.asarray(z, jnp.float32),
        load=jnp.zeros((layers, 2, experts)),
        dropped=jnp.zeros(layers),
        tokens=jnp.full(layers, 8.0),
    )


def test_balanced_router_costs_one():
    np.testing.assert_allclose(balance_loss(stats([[2, 2, 2, 2]], [[2, 2, 2, 2]])), 1.0)


def test_collapsed_router_costs_the_number_of_experts():
    np.testing.assert_allclose(balance_loss(stats([[8, 0, 0, 0]], [[8, 0, 0, 0]])), 4.0)


def test_balance_by_hand():
    # f = (6, 2) / 8, P = (5, 3) / 8: 2 (0.75 * 0.625 + 0.25 * 0.375) = 1.125
    np.testing.assert_allclose(balance_loss(stats([[6, 2]], [[5, 3]])), 1.125)


def test_layers_are_summed():
    two = stats([[6, 2], [4, 4]], [[5, 3], [4, 4]], z=(16.0, 4.0))
    np.testing.assert_allclose(balance_loss(two), 1.125 + 1.0)
    # Means of the squared log-partition: 16 / 8 + 4 / 8.
    np.testing.assert_allclose(z_loss(two), 2.5)
