"""Divergences against their definitions on probabilities in float64, and cases worked by hand."""

import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import DistillationConfig, Divergence
from moddistill.extraction.program import draw
from moddistill.losses.divergences import cross_entropy, divergence, divergence_to
from moddistill.teachers.targets import Samples, TopK

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
        "uld": np.abs(np.sort(p) - np.sort(q)).sum(-1),
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


def top_k(teacher_logits, count, temperature=1.0):
    """The `count` most probable ids, and all others together; none of them if it has all."""
    log_p = jax.nn.log_softmax(teacher_logits / temperature)
    logprobs, ids = jax.lax.top_k(log_p, count)
    others = jnp.put_along_axis(log_p, ids, -1e30, axis=1, inplace=False)
    return TopK(ids, logprobs, jax.nn.logsumexp(others, axis=1))


def value_and_gradient(fn, logits):
    return jax.value_and_grad(lambda x: jnp.sum(fn(x)))(logits)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_all_ids_and_no_rest_are_the_whole_distribution(kind, temperature):
    config = DistillationConfig(divergence=kind, mix=0.3, temperature=temperature)
    student, teacher = random_logits(1), random_logits(2)
    known = top_k(teacher, 11, temperature)
    found = value_and_gradient(lambda x: divergence_to(known, x, config), student)
    expected = value_and_gradient(lambda x: divergence(x, teacher, config), student)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uld"])
def test_a_bucket_for_the_rest_is_never_above_the_whole_and_has_its_gradient(kind):
    """Against the definition on the K + 1 probabilities."""
    config = DistillationConfig(divergence=kind, mix=0.3)
    student, teacher = random_logits(1), random_logits(2)
    known = top_k(teacher, 4)

    def grouped(logits):
        probs = jax.nn.softmax(logits)
        chosen = jnp.take_along_axis(probs, known.ids, axis=1)
        return jnp.log(jnp.concatenate([chosen, 1 - chosen.sum(1, keepdims=True)], axis=1))

    found = value_and_gradient(lambda x: divergence_to(known, x, config), student)
    expected = value_and_gradient(
        lambda x: divergence(grouped(x), grouped(teacher), config), student
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    whole = divergence(student, teacher, config)
    assert np.all(divergence_to(known, student, config) <= whole + 1e-6)
    outside = jnp.put_along_axis(found[1], known.ids, 0.0, axis=1, inplace=False)
    assert np.abs(outside).max() > 1e-3  # without the bucket, nothing


@pytest.mark.parametrize("count", [4, 11])
def test_the_largest_probabilities_of_two_vocabularies_are_compared(count):
    """The student has 8 ids, the teacher 11; the order of the known ids does not matter."""
    config = DistillationConfig(divergence="uld", temperature=2.0)
    student, teacher = random_logits(1, vocab=8), random_logits(2)
    known = top_k(teacher, count, 2.0)
    mixed = TopK(*(x[:, ::-1] for x in known[:2]), known.log_rest)

    def by_hand(logits):
        p = np.exp(np.float64(known.logprobs))
        q = np.exp(np.float64(logits) / 2)
        q = -np.sort(-q / q.sum(1, keepdims=True))
        q = np.pad(q, ((0, 0), (0, 11 - 8)))
        rest = np.abs((1 - p.sum(1)) - q[:, count:].sum(1))
        return 4 * (np.abs(p - q[:, :count]).sum(1) + rest)

    np.testing.assert_allclose(divergence_to(mixed, student, config), by_hand(student), rtol=1e-5)
    padded = jnp.pad(student, ((0, 0), (0, 3)), constant_values=-1e30)
    whole = divergence(padded, teacher, config)
    assert np.all(divergence_to(known, student, config) <= whole + 1e-6)
    gradient = jax.grad(lambda x: jnp.sum(divergence_to(mixed, x, config)))(student)
    step = np.zeros(student.shape)
    step[2, 3] = 1e-3
    slope = (by_hand(student + step) - by_hand(student - step)).sum() / 2e-3
    np.testing.assert_allclose(gradient[2, 3], slope, rtol=1e-2)


def test_a_rest_below_the_precision_of_one_is_not_lost():
    """At q = 1e-9 outside of the known ids, one minus their sum is 0."""
    student = jnp.asarray([[20.0, 0.0, -0.7, 20.0]])
    known = TopK(
        jnp.asarray([[0, 3]]), jnp.log(jnp.asarray([[0.5, 0.4]])), jnp.log(jnp.asarray([0.1]))
    )
    value, gradient = value_and_gradient(
        lambda x: divergence_to(known, x, DistillationConfig()), student
    )
    q = np.exp(np.float64([20, 0, -0.7, 20]))
    q /= q.sum()
    p = [0.5, 0.4, 0.1]
    expected = sum(a * math.log(a / b) for a, b in zip(p, [q[0], q[3], q[1] + q[2]], strict=True))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and gradient[0, 1] < -0.05


def test_classes_of_ids_by_hand():
    """Ids 0 and 1 are one class; of another, whose ids are 2 and 3, no probability is known."""
    student = jnp.log(jnp.asarray([[0.1, 0.2, 0.3, 0.0, 0.4]])).clip(min=-1e9)
    known = TopK(
        jnp.asarray([[0, 4]]),
        jnp.log(jnp.asarray([[0.5, 0.4]])),
        jnp.log(jnp.asarray([0.1])),
        jnp.asarray([0, 0, 2, 2]),
    )
    value, gradient = value_and_gradient(
        lambda x: divergence_to(known, x, DistillationConfig()), student
    )
    expected = 0.5 * math.log(0.5 / 0.3) + 0.1 * math.log(0.1 / 0.3)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # d KL / d logit = q - p of its class, shared in the class by q.
    np.testing.assert_allclose(gradient[0], [-0.2 / 3, -0.4 / 3, 0.2, 0, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "skew_kl"])
def test_the_mean_over_drawn_ids_has_no_bias(kind):
    """Values and gradients of 2,000 draws of an extraction, within 3 standard errors."""
    config = DistillationConfig(divergence=kind, mix=0.3)
    student, teacher = random_logits(1), random_logits(2) / 3  # without an id that is never drawn
    log_p = jax.nn.log_softmax(teacher)

    def of_draw(record):
        ids = draw(log_p, 0, jnp.full(6, record), jnp.arange(6), count=16)
        known = Samples(ids, jnp.take_along_axis(log_p, ids, axis=1))
        values = divergence_to(known, student, config)
        return values, jax.grad(lambda x: jnp.sum(divergence_to(known, x, config)))(student)

    draws = jax.vmap(of_draw)(jnp.arange(2000))
    exact = (
        divergence(student, teacher, config),
        jax.grad(lambda x: jnp.sum(divergence(x, teacher, config)))(student),
    )
    for found, expected in zip(draws, exact, strict=True):
        error = np.std(found, axis=0) / math.sqrt(2000)
        assert np.all(np.abs(np.mean(found, axis=0) - expected) < 3 * error + 1e-6)


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
