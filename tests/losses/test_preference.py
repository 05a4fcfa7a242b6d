import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import PREFERENCE_KINDS, PreferenceConfig, RouterLossConfig
from moddistill.losses.preference import preference_loss, preference_losses
from moddistill.models.batch import PreferenceBatch
from moddistill.models.vlm import Vlm
from moddistill.params import flatten, merge
from moddistill.teachers.live import LiveTeacher


def losses(chosen, rejected, kind, beta=0.1, label_smoothing=0.0):
    ratios = (jnp.asarray(x, jnp.float32) for x in (chosen, rejected))
    is_pair = jnp.ones(np.shape(chosen), bool)
    return preference_losses(*ratios, is_pair, kind, beta, label_smoothing)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("kind", "expected"), [("sigmoid", math.log(2)), ("hinge", 1), ("ipo", 25), ("kto_pair", 0.5)]
)
def test_student_equal_to_teacher(kind, expected):
    np.testing.assert_allclose(losses([0, 0], [0, 0], kind), [expected] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # The margin is 4 - (-2) = 6, times beta 0.6.
        ("sigmoid", -math.log(sigmoid(0.6))),
        ("hinge", 1 - 0.6),
        ("ipo", (6 - 5) ** 2),
    ],
)
def test_one_pair_by_hand(kind, expected):
    np.testing.assert_allclose(losses([4], [-2], kind), [expected], rtol=1e-5)


def test_hinge_is_zero_beyond_its_margin():
    np.testing.assert_array_equal(losses([30], [0], "hinge"), [0])


def test_label_smoothing_by_hand():
    # A fifth of the labels taken as swapped.
    expected = -0.8 * math.log(sigmoid(0.6)) - 0.2 * math.log(sigmoid(-0.6))
    np.testing.assert_allclose(
        losses([4], [-2], "sigmoid", label_smoothing=0.2), [expected], rtol=1e-5
    )


def test_kto_pair_by_hand():
    # KL estimates: mean(4, -2) = 1 of the chosen answers, mean(3, 1) = 2 of the rejected ones.
    keep = [1 - sigmoid(0.1 * (4 - 2)), 1 - sigmoid(0.1 * (-2 - 2))]
    avoid = [1 - sigmoid(0.1 * (1 - 3)), 1 - sigmoid(0.1 * (1 - 1))]
    expected = (np.asarray(keep) + avoid) / 2
    np.testing.assert_allclose(losses([4, -2], [3, 1], "kto_pair"), expected, rtol=1e-5)


def test_kto_pair_clips_negative_kl_at_zero():
    expected = [(1 - sigmoid(0.1 * -4) + 1 - sigmoid(0.1 * 2)) / 2]
    np.testing.assert_allclose(losses([-4], [-2], "kto_pair"), expected, rtol=1e-5)


def test_kl_estimate_is_not_differentiated():
    grad = jax.grad(lambda r: jnp.sum(losses([0.0, 0.0], r, "kto_pair")))(jnp.asarray([3.0, 1.0]))
    # Only the halves of the rejected answers: d/dr [1 - sigmoid(-0.1 r)] / 2.
    slope = [0.1 * sigmoid(-0.1 * r) * (1 - sigmoid(-0.1 * r)) / 2 for r in (3, 1)]
    np.testing.assert_allclose(grad, slope, rtol=1e-5)


@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_entries_that_are_no_pair_change_nothing(kind):
    """Neither the losses of pairs, nor the means of `kto_pair`, nor gradients."""
    is_pair = jnp.asarray([True, False, True])

    def total(ratios):
        values = preference_losses(*ratios, is_pair, kind, 0.1)
        return jnp.sum(values), values

    ratios = jnp.asarray([[4.0, 90.0, -2.0], [3.0, -90.0, 1.0]])
    gradient, values = jax.grad(total, has_aux=True)(ratios)
    np.testing.assert_allclose(values[is_pair], losses([4, -2], [3, 1], kind), rtol=1e-6)
    np.testing.assert_array_equal([values[1], *gradient[:, 1]], [0, 0, 0])


@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_no_pair_at_all_has_no_loss(kind):
    values = preference_losses(*jnp.ones((2, 3)), jnp.zeros(3, bool), kind, 0.1)
    np.testing.assert_array_equal(values, [0, 0, 0])


def test_unknown_kind():
    with pytest.raises(
        ValueError, match=r"\.kind: .*, got 'kto_pairs' \(did you mean 'kto_pair'\?\)"
    ):
        losses([0], [0], "kto_pairs")


@pytest.fixture(scope="module")
def models(tiny_architecture, init, random_batch):
    """Student, teacher, their parameters, and three pairs with answers of different lengths."""
    student, teacher = tiny_architecture("tiny"), tiny_architecture("tiny-teacher")
    sides = [random_batch(student, rows=3, length=20, seed=seed) for seed in (0, 1)]
    chosen, rejected = (side._replace(images=None) for side in sides)
    batch = jax.tree.map(jnp.asarray, PreferenceBatch(chosen, rejected, sides[0].images))
    return Vlm(student), Vlm(teacher), init(student, 0), init(teacher, 1), batch


def log_likelihoods(model, params, side, images):
    """Summed over the answer's tokens, from all logits."""
    output = model.apply({"params": params}, side._replace(images=images))
    real = model.config.decoder.real_ids[-1][1]
    logp = jax.nn.log_softmax(Vlm.logits(output)[:, :-1, :real])
    labels = jnp.minimum(side.tokens[:, 1:, None], real - 1)
    chosen = jnp.take_along_axis(logp, labels, -1)[..., 0]
    return jnp.sum(chosen * side.loss_mask[:, 1:], axis=1)


@pytest.fixture(scope="module")
def ratios(models):
    """`ratios(params)`: r of the chosen and the rejected answers."""
    student, teacher, _, teacher_params, batch = models

    def of(params):
        return [
            log_likelihoods(student, params, side, batch.images)
            - log_likelihoods(teacher, teacher_params, side, batch.images)
            for side in (batch.chosen, batch.rejected)
        ]

    return of


def value_and_gradient(models, config, chunk_size):
    student, teacher, params, teacher_params, batch = models
    configs = config, RouterLossConfig()
    loss = preference_loss(student, LiveTeacher(teacher), *configs, chunk_size=chunk_size)
    loss_fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return loss_fn(flatten(params), {}, teacher_params, batch, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PREFERENCE_KINDS)
def test_loss_and_gradients_are_those_of_full_logits(models, ratios, kind):
    """With a beta for which the gradients of all kinds are of order one, as the bounds assume."""
    config = PreferenceConfig(kind=kind, beta=1.0)
    (value, metrics), grads = value_and_gradient(models, config, chunk_size=8)

    @jax.jit
    @jax.value_and_grad
    def plain(trained):
        return jnp.mean(losses(*ratios(merge(trained)), kind, config.beta))

    expected, expected_grads = plain(flatten(models[2]))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(metrics["preference"], (expected * 3, 3), rtol=1e-5)
    np.testing.assert_array_equal(metrics["loss"], metrics["preference"])


def test_rewards(models, ratios):
    (_, metrics), _ = value_and_gradient(models, PreferenceConfig(beta=0.5), chunk_size=64)
    chosen, rejected = map(np.asarray, jax.jit(ratios)(models[2]))
    means = {
        name: metrics[f"reward_{name}"][0] / metrics[f"reward_{name}"][1]
        for name in ("chosen", "rejected", "margin", "accuracy")
    }
    np.testing.assert_allclose(means["chosen"], 0.5 * chosen.mean(), rtol=1e-4)
    np.testing.assert_allclose(means["rejected"], 0.5 * rejected.mean(), rtol=1e-4)
    np.testing.assert_allclose(means["margin"], 0.5 * (chosen - rejected).mean(), rtol=1e-4)
    np.testing.assert_allclose(means["accuracy"], np.mean(chosen > rejected))


def test_student_that_is_its_teacher(models):
    student, _, params, _, batch = models
    configs = PreferenceConfig(kind="sigmoid"), RouterLossConfig()
    loss_fn = jax.jit(preference_loss(student, LiveTeacher(student), *configs, chunk_size=256))
    value, metrics = loss_fn(flatten(params), {}, params, batch, jax.random.key(0))
    np.testing.assert_allclose(value, math.log(2), rtol=1e-6)
    assert metrics["reward_accuracy"][0] == 0
