import jax
import jax.numpy as jnp
import numpy as np

from moddistill.extraction.program import draw, inverse_cumulative
from moddistill.models.logits import MASKED

P = np.array([0.5, 0.0, 0.3, 0.2], np.float32)
ROWS, COUNT = 50, 400


def drawn(records, positions, seed=0, p=P):
    log_p = jnp.broadcast_to(jnp.log(p), (len(records), len(p)))
    return np.array(draw(log_p, seed, jnp.array(records), jnp.array(positions), count=COUNT))


def test_drawn_ids_have_the_teachers_probabilities():
    ids = drawn([3] * ROWS, range(ROWS))
    shares = np.bincount(ids.reshape(-1), minlength=4) / ids.size
    np.testing.assert_allclose(shares, P, atol=4 * np.sqrt(0.25 / ids.size))
    assert shares[1] == 0


def test_each_record_position_and_seed_has_draws_of_its_own():
    same = drawn([3, 3], [5, 5])
    np.testing.assert_array_equal(same[0], same[1])
    for other in (drawn([3, 3], [5, 6])[1], drawn([3, 4], [5, 5])[1], drawn([3], [5], seed=1)[0]):
        assert np.mean(other == same[0]) < 0.6


def test_the_largest_number_draws_a_token():
    """XLA's sums are no monotone sequence where probabilities are 0, and may end below one."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 30_000)).astype(np.float32)
    logits[:, 29_000:] = MASKED
    log_p = jax.nn.log_softmax(logits)
    largest = jnp.array([0.0, 1 - 2.0**-24, 1 - 2.0**-23], jnp.float32)
    ids = np.array(jax.vmap(inverse_cumulative, (0, None))(log_p, largest))
    assert ids.max() < 29_000
    one = jnp.full(8, MASKED).at[3].set(0.0)
    assert inverse_cumulative(one, jnp.ones(2)).tolist() == [3, 3]
