"""The same samples in packed rows and in rows of their own.

A layout is a list of rows, a row a list of samples (or pairs of them) and gaps. A gap is the number
of positions (or two, of both sides) of a sample that could not be read: padding, whose segment is
missing in the row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moddistill.models.batch import Batch, PreferenceBatch


class Sample(NamedTuple):
    """A conversation, or one side of a pair; pixels are [images, h, w, 3]."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    images: np.ndarray


def random_samples(config, count, seed=0):
    """Samples of 6 to 16 tokens, with no, one and two images in turn."""
    rng = np.random.default_rng(seed)
    return [_random_sample(config, rng, i % 3 if config.vision else 0) for i in range(count)]


def random_pairs(config, count):
    """Pairs of such samples, of different lengths, which share their images."""
    sides = (random_samples(config, count, seed) for seed in (1, 2))
    pairs = [(a, b._replace(images=a.images)) for a, b in zip(*sides, strict=True)]
    assert any(len(a.tokens) != len(b.tokens) for a, b in pairs)
    return pairs


def _random_sample(config, rng, images):
    """One or two tokens, images, a few tokens more, and an answer of two to four tokens."""
    vision = config.vision
    first = rng.integers(1, 3)
    last = first + images * (vision.patches if vision else 0)
    answer = last + rng.integers(2, 4)
    length = answer + rng.integers(2, 5)
    tokens = rng.integers(0, config.decoder.real_ids[-1][1], length, np.int32)
    tokens[first:last] = config.image_token_id
    size = vision.image_size if vision else 0
    pixels = rng.integers(0, 256, (images, size, size, 3), np.uint8)
    return Sample(tokens, np.arange(length) >= answer, pixels)


def batch_of(layout, length, images=None):
    """The batch of a layout; `images` are the slots of a row and the height of an image."""
    rows = [_row(items, length, images) for items in layout]
    return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *rows)


def preference_of(layout, length, images=None):
    """The batch of a layout of pairs."""
    chosen, rejected = (
        batch_of([[item[i] for item in row] for row in layout], length, images) for i in (0, 1)
    )
    sides = (side._replace(images=None) for side in (chosen, rejected))
    return PreferenceBatch(*sides, chosen.images)


def _row(items, length, images):
    tokens, positions, segments = np.zeros((3, length), np.int32)
    loss_mask, start, slot = np.zeros(length, bool), 0, 0
    pixels = None if images is None else np.zeros((images[0], images[1], images[1], 3), np.uint8)
    for number, item in enumerate(items, start=1):
        if not isinstance(item, Sample):
            start += item
            continue
        place = slice(start, start + len(item.tokens))
        tokens[place], loss_mask[place], segments[place] = item.tokens, item.loss_mask, number
        positions[place] = np.arange(len(item.tokens))
        for image in item.images:
            pixels[slot], slot = image, slot + 1
        start = place.stop
    assert start <= length
    return Batch(tokens, positions, segments, loss_mask, pixels)
