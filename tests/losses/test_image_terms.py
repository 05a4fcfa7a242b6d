"""Losses at image positions, against a reckoning from all logits, image by image."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import DistillationConfig, RouterLossConfig
from moddistill.losses.distillation import token_loss
from moddistill.losses.divergences import divergence
from moddistill.models.vlm import Vlm
from moddistill.models.vocabulary import common_ids, token_mask
from moddistill.params import flatten, merge
from moddistill.teachers.live import LiveTeacher
from tests.packed_rows import batch_of, random_samples

TERMS = ("kd", "ce", "image_kd", "relation")


@pytest.fixture(scope="module")
def models(tiny_architecture, init):
    """Student, teacher and their parameters; the teacher is far from the student."""
    student, teacher = tiny_architecture("tiny"), tiny_architecture("tiny-teacher")
    teacher_params = init(teacher, 1)
    teacher_params["decoder"]["norm"]["scale"] *= 8
    return Vlm(student), Vlm(teacher), flatten(init(student, 0)), teacher_params


@pytest.fixture(scope="module")
def batch(models):
    """Four rows with three, two, no and one images, in up to three samples."""
    none, one, two = random_samples(models[0].config, 3)
    return batch_of([[none, one, 2, two], [two, none], [none], [3, one]], 45, (5, 28))


def loss_of(models, config, terms=TERMS):
    student, teacher, _, _ = models
    router = RouterLossConfig()
    return token_loss(student, LiveTeacher(teacher), config, router, terms=terms, chunk_size=8)


def run(models, config, batch, terms=TERMS):
    """Loss, metrics and gradients."""
    loss = jax.jit(jax.value_and_grad(loss_of(models, config, terms), has_aux=True))
    return loss(models[2], {}, models[3], batch, jax.random.key(0))


def direct(models, params, batch, config):
    """Loss and mean of each term, from all logits of the ids that both models share."""
    student, teacher, _, teacher_params = models
    outputs = (
        student.apply({"params": merge(params)}, batch),
        teacher.apply({"params": teacher_params}, batch),
    )
    shared = common_ids(student.config.decoder.real_ids, teacher.config.decoder.real_ids)
    ids = np.flatnonzero(token_mask(shared, student.config.decoder.vocab_size))
    logits, teacher_logits = (Vlm.logits(output)[..., ids] for output in outputs)
    relations, at_patches = [], []
    for row, tokens in enumerate(np.asarray(batch.tokens)):
        patches = np.flatnonzero(tokens == student.config.image_token_id)
        for image in np.split(patches, len(patches) // student.config.vision.patches or 1):
            if not len(image):
                continue
            z, target = logits[row, image], teacher_logits[row, image]
            at_patches.append(divergence(z, target, config))
            z, target = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (z, target))
            r, target = z @ z.T, target @ target.T
            norms = jnp.sqrt(jnp.sum(r**2) * jnp.sum(target**2))
            relations.append(1 - jnp.sum(r * target) / norms)
    mask = batch.loss_mask[:, 1:] & (batch.segments[:, 1:] == batch.segments[:, :-1])
    answers = divergence(logits[:, :-1], teacher_logits[:, :-1], config)
    labels = jnp.minimum(batch.tokens[:, 1:, None], len(ids) - 1)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), labels, -1)[..., 0]
    means = {
        "kd": jnp.sum(answers * mask) / mask.sum(),
        "ce": -jnp.sum(log_p * mask) / mask.sum(),
        "image_kd": jnp.mean(jnp.concatenate(at_patches)),
        "relation": jnp.mean(jnp.stack(relations)),
    }
    return sum(getattr(config, f"{name}_weight") * x for name, x in means.items()), means


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"image_kd_weight": 1.0, "relation_weight": 0.5},
        {"image_kd_weight": 0.7, "divergence": "jsd", "temperature": 2.0, "kd_weight": 0.0},
        {"relation_weight": 2.0, "ce_weight": 0.0},
    ],
    ids=["both", "image_kd", "relation"],
)
def test_loss_is_that_of_full_logits(models, batch, fields):
    config = DistillationConfig(**fields)
    (value, metrics), grads = run(models, config, batch)
    plain = jax.value_and_grad(lambda p: direct(models, p, batch, config), has_aux=True)
    (expected, means), expected_grads = jax.jit(plain)(models[2])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(grads, expected_grads, atol=1e-5, rtol=1e-4)
    computed = [name for name in TERMS if getattr(config, f"{name}_weight")]
    assert set(metrics) == {*computed, "loss"}
    answers, patches = batch.loss_mask.sum(), 6 * models[0].config.vision.patches
    counts = {"kd": answers, "ce": answers, "image_kd": patches, "relation": 6}
    for name in computed:
        assert means[name] > 1e-3
        expected = means[name] * counts[name], counts[name]
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5)


BOTH = DistillationConfig(image_kd_weight=0.7, relation_weight=2.0)


@pytest.mark.slow
def test_micro_batches_add_up(models, batch):
    """One has five images and the other one; the means are over all six."""
    loss = loss_of(models, BOTH)
    denominators = loss.denominators(batch)
    gradient = jax.jit(jax.value_and_grad(loss.micro_batch, has_aux=True))
    parts = [
        gradient(
            models[2],
            {},
            models[3],
            jax.tree.map(lambda x, rows=rows: x[rows], batch),
            denominators,
            jax.random.key(0),
        )
        for rows in (slice(0, 2), slice(2, 4))
    ]
    total = jax.tree.map(jnp.add, *parts)
    chex.assert_trees_all_close(total, run(models, BOTH, batch), atol=1e-5, rtol=1e-5)


def test_unused_image_slots_do_not_count(models, batch):
    used = jnp.array([3, 2, 0, 1])
    is_used = (jnp.arange(5)[None] < used[:, None])[..., None, None, None]
    other = batch._replace(images=jnp.where(is_used, batch.images, 200))
    more = batch._replace(images=jnp.pad(batch.images, ((0, 0), (0, 3), *[(0, 0)] * 3)))
    expected = run(models, BOTH, batch)
    for changed in (other, more):
        found = run(models, BOTH, changed)
        chex.assert_trees_all_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_batch_without_images(models):
    """Its loss is that without the terms of images, whose metrics count nothing."""
    none = random_samples(models[0].config, 1)[0]
    batch = batch_of([[none], [none, 2]], 20, (2, 28))
    (value, metrics), grads = run(models, BOTH, batch)
    assert metrics["image_kd"] == metrics["relation"] == (0, 0)
    expected = run(models, DistillationConfig(), batch)
    np.testing.assert_allclose(value, expected[0][0], rtol=1e-6)
    chex.assert_trees_all_close(grads, expected[1], atol=1e-6)


def test_terms_of_weight_0_change_no_bit(models, batch):
    """The default is the loss of answers only."""
    found = run(models, DistillationConfig(), batch)
    expected = run(models, DistillationConfig(), batch, terms=("kd", "ce"))
    chex.assert_trees_all_equal(found, expected)


def test_no_array_of_patches_by_vocabulary_exists(models, batch):
    """Logits exist for a chunk of 8 positions only."""
    loss = jax.grad(loss_of(models, BOTH), has_aux=True)
    run = functools.partial(loss, models[2], {}, models[3], rng=jax.random.key(0))
    text = jax.jit(lambda batch: run(batch=batch)).lower(batch).as_text()
    student, teacher = (model.config.decoder.vocab_size for model in models[:2])
    assert f"8x{student}xf32" in text
    for size in {student, teacher}:
        for positions in ("x4", "45", "180"):  # patches, a row, all rows
            assert f"{positions}x{size}xf32" not in text


def test_relation_without_a_token_term_is_refused(models):
    config = DistillationConfig(kd_weight=0.0, ce_weight=0.0, relation_weight=1.0)
    message = r"^config\.distillation\.kd_weight or ce_weight or image_kd_weight: expected > 0, got"
    with pytest.raises(ValueError, match=message):
        loss_of(models, config)
