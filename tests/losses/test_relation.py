import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.losses.relation import image_patches, image_relations, relation_loss
from moddistill.models.logits import LogitInputs
from tests.models.draw import normal
from tests.packed_rows import batch_of, random_samples


def by_hand(logits, teacher_logits):
    """One image, in float64."""
    matrices = []
    for z in (logits, teacher_logits):
        z = np.asarray(z, np.float64)
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
        matrices.append(z @ z.T)
    student, teacher = matrices
    norms = np.linalg.norm(student) * np.linalg.norm(teacher)
    return 1 - np.sum(student * teacher) / norms


def test_value_by_hand():
    """Patches in the same direction in one model, at right angles in the other."""
    same, apart = jnp.array([[1.0, 1.0], [3.0, 3.0]]), jnp.array([[2.0, 0.0], [0.0, 5.0]])
    # ([[1, 1], [1, 1]] . identity) / (2 * sqrt(2))
    np.testing.assert_allclose(relation_loss(same, apart), 1 - 1 / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(relation_loss(same, 7 * same), 0, atol=1e-6)


def test_value_is_that_of_each_image():
    logits, teacher = normal(2, 3, 6, 40, seed=1), normal(2, 3, 6, 40, seed=2)
    expected = [
        [by_hand(*pair) for pair in zip(*row, strict=True)]
        for row in zip(logits, teacher, strict=True)
    ]
    assert np.min(expected) > 0.05
    np.testing.assert_allclose(relation_loss(logits, teacher), expected, rtol=1e-5)


# Two rows of 12 positions, images of 3 patches: two in the first, none in the second.
INDEX = jnp.array([[[1, 2, 3], [7, 8, 9]], [[0, 0, 0], [0, 0, 0]]])
STUDENT = LogitInputs(normal(24, 8, seed=1), normal(30, 8, seed=2))
TEACHER = LogitInputs(normal(24, 16, seed=3), normal(33, 16, seed=4))
REAL = ((2, 11), (13, 28))
IDS = [*range(2, 11), *range(13, 28)]


def full_logits(model):
    return (model.hidden @ model.head.T)[jnp.concatenate(INDEX[0])][:, jnp.array(IDS)]


def test_value_without_logits_is_that_of_full_logits():
    """Values and gradients, over the shared ids of vocabularies and widths that differ."""

    def direct(student, teacher):
        logits = (full_logits(model).reshape(2, 3, -1) for model in (student, teacher))
        return jnp.sum(relation_loss(*logits))

    def chunked(student, teacher):
        return jnp.sum(image_relations(student, teacher, INDEX, REAL)[0])

    found = jax.value_and_grad(chunked)(STUDENT, TEACHER)
    chex.assert_trees_all_close(found, jax.value_and_grad(direct)(STUDENT, TEACHER), atol=1e-5)
    parts = (np.split(np.asarray(full_logits(model)), 2) for model in (STUDENT, TEACHER))
    expected = [by_hand(*pair) for pair in zip(*parts, strict=True)]
    values = image_relations(STUDENT, TEACHER, INDEX, REAL)
    np.testing.assert_allclose(values[0], expected, atol=1e-5)


def test_the_teacher_gets_no_gradient():
    gradient = jax.grad(lambda x: jnp.sum(image_relations(STUDENT, x, INDEX, REAL)))(TEACHER)
    assert not np.any(gradient.hidden) and not np.any(gradient.head)


def test_hidden_states_of_zero_have_finite_gradients():
    """As those of a row of padding might be."""
    student = STUDENT._replace(hidden=STUDENT.hidden.at[12:].set(0))

    def total(student):
        values = image_relations(student, TEACHER, INDEX, REAL)
        return jnp.sum(values * jnp.array([[1.0], [0.0]]))

    found, expected = (jax.grad(total)(x) for x in (student, STUDENT))
    chex.assert_tree_all_finite(found)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


@pytest.mark.parametrize("slots", [3, 9])
def test_patches_of_packed_samples_are_found(tiny_architecture, slots):
    """Samples with no, one and two images; slots above those that fit into a row do not exist."""
    config = tiny_architecture()
    none, one, two = random_samples(config, 3)
    batch = batch_of([[2, none, one, 1, two], [two, none], [5]], 45, (slots, 28))
    found = image_patches(batch, config)
    assert found.used.shape == (3, min(slots, 45 // config.vision.patches))
    np.testing.assert_array_equal(found.used.sum(axis=1), [3, 2, 0])
    positions = np.where(found.used[..., None], found.index, -1)
    for row, tokens in zip(positions, np.asarray(batch.tokens), strict=True):
        np.testing.assert_array_equal(
            row[row >= 0], np.flatnonzero(tokens == config.image_token_id)
        )


def test_rows_too_short_for_an_image_have_none(tiny_architecture, random_batch):
    config = tiny_architecture()
    batch = random_batch(config, rows=2, length=16)
    short = batch._replace(tokens=batch.tokens[:, :3] * 0, segments=batch.segments[:, :3])
    assert image_patches(short, config).index.shape == (2, 0, config.vision.patches)
