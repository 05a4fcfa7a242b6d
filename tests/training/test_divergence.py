"""Steps whose loss is not finite or too large."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moddistill.losses import Loss
from moddistill.models.batch import make_batch
from moddistill.models.presets import preset
from moddistill.training.state import State
from moddistill.training.step import Divergence, make_step

TEXT = preset("demo-language")
OPTIMIZER = optax.adam(0.1)


class Given(Loss):
    """The loss is a parameter times the number in the batch."""

    def __init__(self):
        pass

    def denominators(self, batch):
        return None

    def micro_batch(self, params, frozen, teacher, batch, denominators, rng):
        loss = params["w"].sum() * batch.tokens[0, 0]
        return loss, {"loss": (loss, jnp.ones(()))}


def state():
    params = {"w": jnp.full(2, 0.5)}
    return State(jnp.int32(0), params, {}, OPTIMIZER.init(params), jnp.float32(jnp.nan))


def run(losses, divergence):
    """Returns states and metrics of steps with about the given losses."""
    step = jax.jit(make_step(Given(), OPTIMIZER, 1, 0, TEXT, divergence))
    found, now = [], state()
    for loss in losses:
        batch = make_batch(np.zeros, rows=1, length=4, images=None)
        now, metrics = step(now, None, batch._replace(tokens=np.full((1, 4), loss, np.float32)))
        found.append((now, metrics))
    return found


def diverged(losses, divergence):
    return [int(metrics["diverged"][0]) for _, metrics in run(losses, divergence)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_loss_that_is_not_finite_diverges(bad):
    assert diverged([1.0, bad], Divergence()) == [0, 1]


def test_loss_diverges_beyond_a_multiple_of_its_running_mean():
    assert diverged([1.0, 1.0, 1e6], Divergence(factor=0.0)) == [0, 0, 0]
    assert diverged([1.0, 1.0, 20.0, 1.0], Divergence(factor=5.0, skips=True)) == [0, 0, 1, 0]
    assert diverged([1e6, 1.0], Divergence(factor=5.0)) == [0, 0]  # no mean before the first
    # Five times a tenth more than the mean, so that noise of tiny losses does not count.
    assert diverged([1e-6, 0.4], Divergence(factor=5.0)) == [0, 0]


@pytest.mark.parametrize(("rate", "expected"), [(0.5, 0), (1e6, 1)])
def test_norm_of_the_parameters_diverges_beyond_a_multiple_of_that_before(rate, expected):
    """The loss of this step is still that of the parameters before it."""
    step = jax.jit(make_step(Given(), optax.adam(rate), 1, 0, TEXT, Divergence(factor=5.0)))
    batch = make_batch(np.ones, rows=1, length=4, images=None)
    first = state().replace(opt_state=optax.adam(rate).init(state().params))
    assert int(step(first, None, batch)[1]["diverged"][0]) == expected


@pytest.mark.parametrize("bad", [float("nan"), 50.0])
def test_skipped_step_changes_nothing_but_the_number_of_steps(bad):
    found = run([1.0, bad, 1.0], Divergence(5.0, skips=True))
    (before, _), (skipped, metrics), (after, _) = found
    assert (int(skipped.step), int(after.step)) == (2, 3)
    chex.assert_trees_all_equal(before, skipped.replace(step=before.step))
    assert metrics["loss"] == (0, 0) and metrics["diverged"] == (1, 1)
    assert not np.array_equal(after.params["w"], skipped.params["w"])
    # As if it had not been.
    [_, (expected, _)] = run([1.0, 1.0], Divergence(5.0, skips=True))
    np.testing.assert_array_equal(after.params["w"], expected.params["w"])


def test_mean_follows_the_loss_slowly():
    found = run([1.0, 2.0], Divergence())
    losses = [float(metrics["loss"][0]) for _, metrics in found]
    assert float(found[1][0].mean_loss) == pytest.approx(0.98 * losses[0] + 0.02 * losses[1])
