"""Losses do not depend on which samples are in one row."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import (
    PREFERENCE_KINDS,
    DistillationConfig,
    ExpertConfig,
    PreferenceConfig,
    RouterLossConfig,
)
from moddistill.losses.distillation import token_loss
from moddistill.losses.preference import preference_loss
from moddistill.models.vlm import Vlm
from moddistill.params import flatten
from moddistill.teachers.live import LiveTeacher
from tests.packed_rows import batch_of, preference_of, random_pairs, random_samples

ROUTER = RouterLossConfig(z_weight=0.02)
EXPERTS = ExpertConfig(dispatch="capacity", capacity_factor=0.6)
TOKEN_LOSSES = {
    "kd and ce": DistillationConfig(kd_weight=0.7, ce_weight=1.3),
    "kd of all tokens": DistillationConfig(kd_positions="all_tokens"),
    "kd one position late": DistillationConfig(kd_shift="reference"),
    "kd of patches and their relation": DistillationConfig(
        kd_weight=0.0, image_kd_weight=0.7, relation_weight=2.0
    ),
}
LOSSES = (*TOKEN_LOSSES, *PREFERENCE_KINDS)


@pytest.fixture(scope="module")
def models(tiny_architecture, init):
    """Student, teacher and their parameters; the teacher is far from the student."""
    student, teacher = tiny_architecture("tiny", EXPERTS), tiny_architecture("tiny-teacher")
    teacher_params = init(teacher, 1)
    teacher_params["decoder"]["norm"]["scale"] *= 8
    return Vlm(student), LiveTeacher(Vlm(teacher)), flatten(init(student, 0)), teacher_params


@pytest.fixture(scope="module")
def run(models):
    """`run(name, layout)`: the loss of that name, its metrics and its gradients."""
    student, teacher, params, teacher_params = models

    @functools.cache  # batches of all layouts have the same shapes
    def compiled(name):
        if name in TOKEN_LOSSES:
            config = TOKEN_LOSSES[name]
            terms = ("kd", "ce", "image_kd", "relation")
            loss = token_loss(student, teacher, config, ROUTER, terms=terms, chunk_size=8)
        else:
            config = PreferenceConfig(kind=name, beta=0.5)
            loss = preference_loss(student, teacher, config, ROUTER, chunk_size=8)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run(name, layout):
        make = batch_of if name in TOKEN_LOSSES else preference_of
        rng = jax.random.key(0)
        return compiled(name)(params, {}, teacher_params, make(layout, 45, (4, 28)), rng)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_packed_samples_have_the_loss_of_samples_in_rows_of_their_own(models, run, name):
    """Five samples in two rows, with padding between them, and two more rows of padding only."""
    is_token = name in TOKEN_LOSSES
    one, two, three, four, five = (random_samples if is_token else random_pairs)(
        models[0].config, 5
    )
    gap = 3 if is_token else (2, 3)
    packed = run(name, [[gap, one, two, gap, three], [], [four, gap, five], [gap], []])
    apart = run(name, [[one], [two], [three], [four], [five]])
    (value, metrics), gradients = apart
    assert value > 0.1 and max(jnp.max(jnp.abs(x)) for x in gradients.values()) > 1e-2
    assert metrics["dropped"][0] > 0
    chex.assert_trees_all_close(packed, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_padding_has_no_loss_and_no_gradient(run, name):
    gap = 5 if name in TOKEN_LOSSES else (5, 4)
    (value, metrics), gradients = run(name, [[], [gap], [], [], [gap]])
    assert value == 0 and metrics["loss"][1] == 0
    chex.assert_tree_all_finite(metrics)
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_a_sample_does_not_depend_on_the_one_after_it_to_the_last_bit(tiny_architecture, init):
    """Hidden states, loss and gradients of the first of two samples, when the second changes."""
    config = tiny_architecture()
    student, teacher = Vlm(config), LiveTeacher(Vlm(tiny_architecture("tiny-teacher")))
    _, first, second = random_samples(config, 3)
    second = second._replace(loss_mask=np.zeros_like(second.loss_mask))
    other = second._replace(
        tokens=np.where(second.tokens == config.image_token_id, second.tokens, 7),
        images=255 - second.images,
    )
    loss = token_loss(
        student, teacher, DistillationConfig(), ROUTER, terms=("kd", "ce"), chunk_size=8
    )
    params, teacher_params = init(config, 0), init(teacher.model.config, 1)

    @jax.jit
    def run(batch):
        hidden = student.apply({"params": params}, batch).hidden
        gradient = jax.value_and_grad(loss, has_aux=True)
        return hidden, gradient(flatten(params), {}, teacher_params, batch, jax.random.key(0))

    (hidden, result), (other_hidden, other_result) = (
        run(batch_of([[first, after]], 34, (3, 28))) for after in (second, other)
    )
    length = len(first.tokens)
    assert not np.array_equal(hidden[:, length:], other_hidden[:, length:])
    np.testing.assert_array_equal(hidden[:, :length], other_hidden[:, :length])
    chex.assert_trees_all_equal(result, other_result)
