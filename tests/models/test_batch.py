import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import DataConfig
from moddistill.models.batch import (
    Batch,
    PreferenceBatch,
    concatenate_sides,
    image_slots,
    make_batch,
    num_samples,
    num_tokens,
    padded_batch,
)


def test_padding_follows_the_tokens_of_each_row():
    batch = padded_batch(np.zeros((3, 4), np.int32), np.array([4, 1, 0]))
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3]] * 3)
    assert batch.loss_mask is batch.images is None
    row = padded_batch(np.zeros(4, np.int32), np.int32(1))
    chex.assert_trees_all_equal(row, jax.tree.map(lambda x: x[1], batch))


def test_both_sides_of_a_preference_batch_share_images():
    sides = [padded_batch(np.full((2, 3), i, np.int32), np.array([1, 2]) + i) for i in range(2)]
    images = np.zeros((2, 1, 2, 2, 3), np.uint8)
    both = concatenate_sides(PreferenceBatch(*sides, images))
    np.testing.assert_array_equal(both.tokens, [[0] * 3, [0] * 3, [1] * 3, [1] * 3])
    np.testing.assert_array_equal(both.segments.sum(axis=1), [1, 2, 2, 3])
    assert both.loss_mask is None
    assert both.images is images


def test_number_of_tokens_excludes_padding():
    side = padded_batch(jnp.zeros((2, 3), jnp.int32), jnp.array([1, 3]))
    count = num_tokens(side)
    assert (count, count.dtype) == (4, jnp.float32)
    assert num_tokens(PreferenceBatch(side, side)) == 8


def test_number_of_samples_is_that_of_first_tokens():
    """Rows of two samples with padding between them, of one, and of none."""
    batch = Batch(
        tokens=jnp.zeros((3, 5), jnp.int32),
        positions=jnp.asarray([[0, 1, 0, 0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]),
        segments=jnp.asarray([[1, 1, 0, 3, 3], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]),
    )
    count = num_samples(batch)
    assert (count, count.dtype) == (3, jnp.float32)
    assert num_samples(PreferenceBatch(batch, batch)) == 3


@pytest.mark.parametrize(
    ("data", "slots"),
    [
        # 2,048 positions hold three images of 576 tokens, whatever a sample may have.
        ({"packing": True}, 3),
        ({"packing": True, "max_images": 9}, 3),
        ({"packing": False}, 1),
        ({"packing": False, "max_images": 9}, 3),
        ({"packing": False, "max_images": 2}, 2),
        ({"packing": True, "max_length": 100}, 1),
    ],
)
def test_a_row_has_slots_for_the_images_that_fit_into_it(data, slots):
    assert image_slots(DataConfig(**{"max_length": 2048, **data}), 576) == slots


def test_a_made_batch_has_the_shapes_of_a_real_one():
    shapes = make_batch(jax.ShapeDtypeStruct, rows=2, length=3, images=(1, 4))
    real = padded_batch(
        np.zeros((2, 3), np.int32),
        np.array([1, 2]),
        np.zeros((2, 3), bool),
        np.zeros((2, 1, 4, 4, 3), np.uint8),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, real)
    pair = make_batch(jax.ShapeDtypeStruct, rows=2, length=3, images=(1, 4), preference=True)
    side = real._replace(images=None)
    expected = PreferenceBatch(side, side, real.images)
    chex.assert_trees_all_equal_shapes_and_dtypes(pair, expected)


def test_fields_that_are_none_are_no_leaves():
    row = np.zeros((1, 2), np.int32)
    assert len(jax.tree.leaves(Batch(row, row, row))) == 3


def test_batches_do_not_import_jax():
    code = "import sys, moddistill.models.batch; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
