"""The relation of an image's patches: how alike a model's outputs are at any two of them.

    R_ij  = cos(z_i, z_j)                       z_i the logits at patch i; R is [P, P]
    value = 1 - cos(R_student, R_teacher)       over all entries of an image's R; from 0 to 1

This is the relation distillation of LLaVA-KD. Its training code is not released; what is different
from the published description, or open in it:

* The logits are normalised, as the features are in the released model. Without, an entry would be
  as large as the logits of its patches, and R that of the few patches with the largest.
* The logits are those of the ids that teacher and student share.
* There is one matrix an image, also for samples with several images, and the mean is over the
  images of the global batch.

Logits of all patches would be large: [729, 151,936] in float32 take 443 MB an image. Their scalar
products follow from hidden states h and the head W as z_i . z_j = h_i (W^T W) h_j, with one matrix
[D, D] for all images.

References:
  LLaVA-KD: https://arxiv.org/abs/2410.16236.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moddistill.distributed.sharding import constrain_to_batch_sharding
from moddistill.models.batch import Batch, image_positions
from moddistill.models.logits import LogitInputs
from moddistill.models.vlm import ModelConfig
from moddistill.models.vocabulary import IdRanges, token_mask


def relation_loss(
    logits: Float[Array, "*I P V"], teacher_logits: Float[Array, "*I P V"]
) -> Float[Array, "*I"]:
    """Returns the value of each image from its logits, those of shared ids only."""
    return _difference(*(_cosines(x @ x.mT) for x in (logits, teacher_logits)))


class ImagePatches(NamedTuple):
    """The positions of patches in rows of tokens, by image; 0 in the slots without an image."""

    index: Int[Array, "B I P"]
    used: Bool[Array, "B I"]


def image_patches(batch: Batch, config: ModelConfig) -> ImagePatches:
    """Returns where the patches of each image of a batch are."""
    patches = config.vision.patches
    # Every image in a row has all of its patches, so that the n-th patch is one of image n // P.
    slots = min(batch.images.shape[1], batch.tokens.shape[1] // patches)
    is_image = image_positions(batch, config.image_token_id)
    find = functools.partial(jnp.nonzero, size=slots * patches, fill_value=0)
    [index] = jax.vmap(find)(is_image)
    images = jnp.sum(is_image, axis=1) // patches
    used = jnp.arange(slots)[None] < images[:, None]
    return ImagePatches(index.reshape(len(index), slots, patches), used)


def image_relations(
    student: LogitInputs, teacher: LogitInputs, index: Int[Array, "B I P"], real_ids: IdRanges
) -> Float[Array, "B I"]:
    """Returns the value of each image, without a gradient for the teacher.

    It is a finite number in slots without an image, which the caller gives no weight.

    Args:
      student: hidden states of all `B * T` positions, and the head.
      teacher: the same; its width may be another one.
      index: positions of the patches in their row.
      real_ids: ids that both share.
    """
    teacher = jax.lax.stop_gradient(teacher)
    return _difference(*(_image_cosines(model, index, real_ids) for model in (student, teacher)))


def _image_cosines(
    model: LogitInputs, index: Int[Array, "B I P"], real_ids: IdRanges
) -> Float[Array, "B I P P"]:
    """The cosines of all pairs of logits of each image."""
    width = model.hidden.shape[-1]
    hidden = model.hidden.reshape(len(index), -1, width)
    hidden = jnp.take_along_axis(hidden, index.reshape(len(index), -1, 1), axis=1)
    hidden = constrain_to_batch_sharding(hidden).reshape(*index.shape, width)
    head = jnp.where(token_mask(real_ids, len(model.head))[:, None], model.head, 0)
    products = jnp.matmul(head.mT, head, preferred_element_type=jnp.float32)
    hidden = hidden.astype(jnp.float32)
    return _cosines((hidden @ products) @ hidden.mT)


def _cosines(products: Float[Array, "*I P P"]) -> Float[Array, "*I P P"]:
    """Cosines of vectors from their scalar products; 0 for vectors that are 0."""
    squares = jnp.diagonal(products, axis1=-2, axis2=-1)
    scale = _inverse_root(squares)
    return products * scale[..., :, None] * scale[..., None, :]


def _difference(
    student: Float[Array, "*I P P"], teacher: Float[Array, "*I P P"]
) -> Float[Array, "*I"]:
    """1 - cosine of two matrices, as vectors of their entries."""

    def product(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=(-2, -1))

    squares = product(student, student) * product(teacher, teacher)
    return 1.0 - product(student, teacher) * _inverse_root(squares)


def _inverse_root(squares: Float[Array, "*I"]) -> Float[Array, "*I"]:
    """1 / sqrt, whose value and gradient are finite at 0."""
    return jax.lax.rsqrt(jnp.maximum(squares, 1e-20))
