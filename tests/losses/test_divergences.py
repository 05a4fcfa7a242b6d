"""Divergences against their definitions on probabilities in float64, and cases worked by hand."""

import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import DistillationConfig, Divergence
from moddistill.losses.divergences import cross_entropy, divergence

KINDS = typing.get_args(Divergence)


def random_logits(seed, rows=6, vocab=11):
    return jax.random.normal(jax.random.key(seed), (rows, vocab)) * 3


def definition(config, logits, teacher_logits):
    """The divergence of each row from probabilities, in float64."""

    def probs(x):
        x = np.exp(np.asarray(x, np.float64) / config.temperature)
        return x / x.sum(-1, keepdims=True)

    def kl(p, q):
        return (p * np.log(p / q)).sum(-1)

    q, p, a = probs(logits), probs(teacher_logits), config.mix
    values = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": a * kl(p, a * p + (1 - a) * q) + (1 - a) * kl(q, a * p + (1 - a) * q),
        "skew_kl": kl(p, a * p + (1 - a) * q),
        "skew_reverse_kl": kl(q, a * q + (1 - a) * p),
        "total_variation": np.abs(p - q).sum(-1) / 2,
    }
    return config.temperature**2 * values[config.divergence]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_definition(kind, temperature):
    config = DistillationConfig(divergence=kind, mix=0.3, temperature=temperature)
    student, teacher = random_logits(1), random_logits(2)
    np.testing.assert_allclose(
        divergence(student, teacher, config), definition(config, student, teacher), rtol=1e-5
    )
    found = jax.grad(lambda x: jnp.sum(divergence(x, teacher, config)))(student)
    expected = np.zeros(student.shape)
    for index in np.ndindex(student.shape):
        step = np.zeros(student.shape)
        step[index] = 1e-5
        above, below = (
            definition(config, np.asarray(student, np.float64) + sign * step, teacher).sum()
            for sign in (1, -1)
        )
        expected[index] = (above - below) / 2e-5
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_distribution_has_none_to_itself(kind):
    logits = random_logits(0)
    values = divergence(logits + 7, logits, DistillationConfig(divergence=kind))
    np.testing.assert_allclose(values, np.zeros(6), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_ids_have_no_part_and_no_gradient(kind):
    """Their logits are -1e30 in both models (`masked_logits`)."""
    config = DistillationConfig(divergence=kind, temperature=2.0)
    student, teacher = random_logits(3), random_logits(4)
    masked = [jnp.pad(x, ((0, 0), (0, 5)), constant_values=-1e30) for x in (student, teacher)]
    np.testing.assert_allclose(
        divergence(*masked, config), divergence(student, teacher, config), rtol=1e-6
    )
    gradient = jax.grad(lambda x: jnp.sum(divergence(x, masked[1], config)))(masked[0])
    assert not np.any(gradient[:, -5:])
    assert np.all(np.isfinite(gradient))


def test_forward_kl_by_hand():
    student, teacher = jnp.log(jnp.asarray([[[0.9, 0.1]], [[0.5, 0.5]]]))
    # From teacher to student: 0.5 ln(0.5 / 0.9) + 0.5 ln(0.5 / 0.1) = 0.5 ln(25 / 9)
    np.testing.assert_allclose(divergence(student, teacher), [0.5 * math.log(25 / 9)], rtol=1e-5)


def test_total_variation_by_hand():
    student, teacher = jnp.log(jnp.asarray([[[0.9, 0.1]], [[0.5, 0.5]]]))
    config = DistillationConfig(divergence="total_variation")
    np.testing.assert_allclose(divergence(student, teacher, config), [0.4], rtol=1e-5)


def test_cross_entropy_to_the_teacher_is_kl_and_its_entropy():
    logits = random_logits(1), random_logits(2)
    student, teacher = map(np.asarray, logits)
    probs = np.exp(teacher) / np.exp(teacher).sum(-1, keepdims=True)
    log_student = student - np.log(np.exp(student).sum(-1, keepdims=True))
    cross, entropy = -(probs * log_student).sum(-1), -(probs * np.log(probs)).sum(-1)
    np.testing.assert_allclose(divergence(*logits), cross - entropy, atol=1e-5)


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25]] * 2)) + 3
    values = cross_entropy(logits, jnp.asarray([0, 1]))
    np.testing.assert_allclose(values, [math.log(2), math.log(4)], rtol=1e-5)
