"""The batch, from the data pipeline to the loss: the only description of its fields.

Its types are pytrees for jax. Nothing here imports jax, since data workers use this
module; arrays are those of numpy in the pipeline and those of jax in a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from moddistill.config import CachedKind, DataConfig

Array = Any
WITHIN, LAST = 1, 2  # of a chunk


class CachedTargets(NamedTuple):
    """What a teacher cache has of the tokens of rows, at the positions that predict them.

    Elsewhere, and for records without targets, everything is zero. Tokens that teacher and student
    do not have in common are in chunks, of which the teacher's likelihood is known.

    Attributes:
      known: whether there are targets of the token.
      ids: the teacher's most probable ids, or ids drawn from its distribution.
      logprobs: of these ids.
      log_rest: the log-probability of all other ids together; None of drawn ids.
      label_logprobs: the log-likelihood of an answer, at its first position; of pairs only, which
        have no ids.
      chunk: `WITHIN` at a token of a chunk, `LAST` at its last one.
      chunk_logprobs: log-likelihood of a chunk, at its last token.
    """

    known: Bool[Array, "B T"]
    ids: Int[Array, "B T K"] | None = None
    logprobs: Float[Array, "B T K"] | None = None
    log_rest: Float[Array, "B T"] | None = None
    label_logprobs: Float[Array, "B T"] | None = None
    chunk: Int[Array, "B T"] | None = None
    chunk_logprobs: Float[Array, "B T"] | None = None


class TeacherRows(NamedTuple):
    """The samples of rows as a live teacher of another layout reads them: each begins where it does
    in the student's row, and has another template, end token or number of patches.

    Attributes:
      tokens, positions, segments: as in `Batch`.
      in_chunk: at positions of the teacher, whether the token after it is one of a chunk whose
        log-likelihood counts.
      chunk_shift: there, the distance from it to the student's position with this log-likelihood:
        the last of a chunk, or the first of an answer of a pair.
      known: at positions of the student, whether the teacher predicts the same token at one of its
        own; None of pairs, and so are the others below.
      shift: there, the distance to that position.
      chunk: `WITHIN` at a token of a chunk, `LAST` at its last one.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    in_chunk: Bool[Array, "B T"]
    chunk_shift: Int[Array, "B T"]
    known: Bool[Array, "B T"] | None = None
    shift: Int[Array, "B T"] | None = None
    chunk: Int[Array, "B T"] | None = None


class Batch(NamedTuple):
    """Rows of one or several samples; one row has the same fields without axis B.

    Samples of a row follow each other in the order of their segments. Padding is at the end of a
    row, and between samples: in place of one that could not be read, and where a teacher of another
    layout needs more tokens.

    Attributes:
      tokens: ids; the image placeholder is repeated once per patch.
      positions: of each token in its sample, from 0, for rotary embeddings.
      segments: the number of a token's sample within the row, 1 to T; 0 is padding.
      loss_mask: true where the token *at that position* is supervised; None for prompts.
      images: pixels of the samples of a row in their order, without gaps, and zeros in the unused
        slots after them; None for text-only models.
      features: vision features of another model with the same encoder, in place of images.
      teacher: targets from a cache, or the rows as a teacher of another layout reads them.
      teacher_images: the same images as this teacher reads them; None if as the student does.
      on_policy: rows whose answer is the student's own, so that its tokens are no labels; None if
        all answers are those of records.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    loss_mask: Bool[Array, "B T"] | None = None
    images: UInt8[Array, "U I h w 3"] | None = None
    features: Float[Array, "U X W"] | None = None
    teacher: CachedTargets | TeacherRows | None = None
    teacher_images: UInt8[Array, "U I h w 3"] | None = None
    on_policy: Bool[Array, "B"] | None = None


class PreferenceBatch(NamedTuple):
    """Two answers to each prompt, as batches without images, and the images that they share.

    Both sides of a row have the same segments, in the same order: segment s of one and of the other
    are a pair. Their lengths differ.
    """

    chosen: Batch
    rejected: Batch
    images: UInt8[Array, "B I h w 3"] | None = None
    teacher_images: UInt8[Array, "B I h w 3"] | None = None


AnyBatch = Batch | PreferenceBatch


def concatenate_sides(batch: PreferenceBatch) -> Batch:
    """Both sides as one batch [2B, T]: chosen answers first; images [B, ...] serve both halves."""
    import jax  # noqa: PLC0415  data workers import this module

    both = jax.tree.map(lambda *x: jax.numpy.concatenate(x), batch.chosen, batch.rejected)
    return both._replace(images=batch.images, teacher_images=batch.teacher_images)


def sides_of(batch: AnyBatch) -> tuple[Batch, ...]:
    """Chosen and rejected side of a preference batch; another batch as its only side."""
    return (batch.chosen, batch.rejected) if isinstance(batch, PreferenceBatch) else (batch,)


def num_tokens(batch: AnyBatch) -> Float[Array, ""]:
    """The number of tokens that are not padding, of both sides of a preference batch."""
    return sum((side.segments > 0).sum() for side in sides_of(batch)).astype(np.float32)


def num_samples(batch: AnyBatch) -> Float[Array, ""]:
    """The number of samples, or of pairs."""
    return sample_starts(sides_of(batch)[0]).sum().astype(np.float32)


def sample_starts(batch: Batch) -> Bool[Array, "*B T"]:
    """Marks the first token of each sample."""
    # Padding may count positions too (`padded_batch`).
    return (batch.positions == 0) & (batch.segments > 0)


def image_positions(batch: Batch, image_token_id: int) -> Bool[Array, "*B T"]:
    """Marks the tokens that are patches of images."""
    return (batch.tokens == image_token_id) & (batch.segments > 0)


def image_slots(data: DataConfig, image_tokens: int) -> int:
    """Returns the image slots of a row, at least one: as many images as its tokens can hold.

    A row that is one sample has at most `max_images`.

    Args:
      image_tokens: patches per image.
    """
    slots = max(1, data.max_length // image_tokens)
    return slots if data.packing else min(data.max_images, slots)


def padded_batch(
    tokens: Int[Array, "*B T"],
    lengths: Int[Array, "*B"],
    loss_mask: Bool[Array, "*B T"] | None = None,
    images: UInt8[Array, "U I h w 3"] | None = None,
) -> Batch:
    """Rows of one sample each, `lengths` tokens and then padding; also a row without axis B."""
    # Right-padded rows count positions through their padding, which no token attends to.
    positions = np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape)
    segments = (positions < lengths[..., None]).astype(np.int32)
    return Batch(tokens, positions, segments, loss_mask, images)


class CacheShape(NamedTuple):
    """What a teacher cache has of a token: its kind, and the number K of ids, 0 of pairs."""

    kind: CachedKind
    ids: int


def make_targets(
    array: Callable[[tuple[int, ...], Any], Any], shape: tuple[int, ...], cached: CacheShape
) -> CachedTargets:
    """Targets of arrays `array(shape, dtype)`, at positions of a given shape."""
    known = array(shape, np.bool_)
    if cached.kind == "answers":
        return CachedTargets(known, label_logprobs=array(shape, np.float32))
    per_id = (*shape, cached.ids)
    return CachedTargets(
        known,
        array(per_id, np.int32),
        array(per_id, np.float32),
        array(shape, np.float32) if cached.kind == "top_k" else None,
        chunk=array(shape, np.int8),
        chunk_logprobs=array(shape, np.float32),
    )


def make_teacher_rows(
    array: Callable[[tuple[int, ...], Any], Any], shape: tuple[int, ...], is_pair: bool
) -> TeacherRows:
    """Teacher rows of arrays `array(shape, dtype)`, at positions of a given shape."""
    ids = (array(shape, np.int32) for _ in range(3))
    rows = TeacherRows(*ids, in_chunk=array(shape, np.bool_), chunk_shift=array(shape, np.int32))
    if is_pair:
        return rows
    return rows._replace(
        known=array(shape, np.bool_), shift=array(shape, np.int32), chunk=array(shape, np.int8)
    )


def make_batch(
    array: Callable[[tuple[int, ...], Any], Any],
    *,
    rows: int,
    length: int,
    images: tuple[int, int] | None = None,
    preference: bool = False,
    cached: CacheShape | None = None,
    own_rows: bool = False,
    teacher_images: tuple[int, int] | None = None,
) -> AnyBatch:
    """A batch of arrays `array(shape, dtype)`: shapes for a compiler, or a dummy.

    Args:
      images: slots of a row, and the height of an image, which is its width; None without images.
      preference: a batch with two sides.
      cached: of the teacher's cache; None without one.
      own_rows: whether a live teacher reads the rows in a layout of its own.
      teacher_images: as `images`, of a teacher that reads them at another size.
    """
    shape = (rows, length)

    def side() -> Batch:
        ids = (array(shape, np.int32) for _ in range(3))
        teacher = make_targets(array, shape, cached) if cached else None
        if own_rows:
            teacher = make_teacher_rows(array, shape, preference)
        return Batch(*ids, loss_mask=array(shape, bool), teacher=teacher)

    def pixels(slots: tuple[int, int] | None) -> Any:
        if slots is None:
            return None
        count, size = slots
        return array((rows, count, size, size, 3), np.uint8)

    both = {"images": pixels(images), "teacher_images": pixels(teacher_images)}
    return PreferenceBatch(side(), side(), **both) if preference else side()._replace(**both)
