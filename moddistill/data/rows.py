"""Rows of a batch from planned samples: arrays of one fixed shape, without axis B.

T: max_length, I: `needed_image_slots`, h = w: image_size.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from moddistill.data.examples import Side, encode_sides
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import preprocess, read_image
from moddistill.data.packing import Plan, Sample
from moddistill.data.quarantine import Rejected
from moddistill.data.records import AnyRecord
from moddistill.data.sources import Source
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError
from moddistill.models.batch import AnyBatch, Batch, CachedTargets, PreferenceBatch


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """Format and fixed shapes of rows.

    Attributes:
      kind: of the records, "conversation" or "preference".
      max_length: tokens of a row.
      image_tokens: patches per image; 0 for a model without a vision encoder.
    """

    kind: str
    template: str
    max_length: int
    image_size: int
    image_tokens: int
    images: ImageRules


class MadeRow(NamedTuple):
    """A row, and records with a reason.

    Attributes:
      rejected: records that turned out bad, whose tokens are padding.
      without_targets: records of which a teacher cache has no targets.
    """

    batch: AnyBatch
    rejected: tuple[Rejected, ...]
    without_targets: tuple[Rejected, ...] = ()


class WithoutTargets(UserError):
    """A record is read, but has no targets in a teacher cache."""


def needed_image_slots(sources: Sequence[Source], packing: bool) -> int:
    """Returns the number of images that a row needs place for, at least 1.

    Of packed rows it follows from the tokens that the records have for each image: with at least r
    of them, a row of T tokens has no more than T / r images.
    """
    if not packing:
        return max(1, *(source.most_images for source in sources))
    return max(1, *(source.most_images_of_rows for source in sources))


@runtime_checkable
class TargetReader(Protocol):
    """Targets of records from a teacher cache; safe in threads and worker processes."""

    def empty(self, length: int) -> CachedTargets:
        """Returns the targets of `length` positions, none of which is known."""

    def read(self, source: int, position: int, sides: Sequence[Side]) -> Sequence[CachedTargets]:
        """Returns the targets of the positions of a sample, for each of its sides.

        Args:
          source: its number.
          position: number of the record among all of the source.

        Raises:
          WithoutTargets: the cache has none of these answers, which are read without.
          UserError: the same of a pair, which is left out.
        """


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Makes the rows of a plan; safe in threads and worker processes.

    Attributes:
      image_slots: images of a row.
      targets: of a teacher cache, if rows have them.
    """

    plan: Plan
    sources: Sequence[Source]
    tokenizer: Tokenizer
    spec: RowSpec
    image_slots: int
    targets: TargetReader | None = None

    def __call__(self, number: int) -> MadeRow:
        """Reads the records and images of a row."""
        spec, cursor, slot = self.spec, 0, 0
        rejected: list[Rejected] = []
        without_targets: list[Rejected] = []
        sides = [self._empty() for _ in range(_num_sides(spec))]
        pixels = self._no_images()
        for segment, sample in enumerate(self.plan.row(number), start=1):
            try:
                content, images = self._read(sample)
                targets = self._targets(sample, content, without_targets)
            except UserError as error:
                rejected.append(self._rejected(sample, error))
            else:
                for row, side, known in zip(sides, content, targets, strict=True):
                    _write(row, side, known, cursor, segment)
                for image in images:
                    pixels[slot] = image
                    slot += 1
            # A bad sample leaves its place empty, so that nothing else moves.
            cursor += sample.length
        if spec.kind == "preference":
            return MadeRow(PreferenceBatch(*sides, images=pixels), tuple(rejected))
        batch = sides[0]._replace(images=pixels)
        return MadeRow(batch, tuple(rejected), tuple(without_targets))

    def _read(self, sample: Sample) -> tuple[list[Side], list[np.ndarray]]:
        """Returns sides and images of a sample; UserError if they are not as planned."""
        spec = self.spec
        record = self.sources[sample.source][sample.record]
        sides = encode_sides(record, spec.template, self.tokenizer, spec.image_tokens)
        sides = [Side(*(x[: spec.max_length] for x in side)) for side in sides]
        length = max(len(side.tokens) for side in sides)
        if length != sample.length:
            raise UserError(
                f"record: expected {sample.length} tokens as in its index, got {length}; the file "
                "has changed, or an image in it is empty"
            )
        return sides, _read_images(record, spec)

    def _targets(
        self, sample: Sample, sides: Sequence[Side], without_targets: list[Rejected]
    ) -> Sequence[CachedTargets | None]:
        """Returns the targets of a sample; appends it to `without_targets` if there are none."""
        if self.targets is None:
            return [None] * len(sides)
        [position] = self.sources[sample.source].positions(np.array([sample.record])).tolist()
        try:
            return self.targets.read(sample.source, position, sides)
        except WithoutTargets as error:
            without_targets.append(self._rejected(sample, error))
            return [None] * len(sides)

    def _empty(self) -> Batch:
        length = self.spec.max_length
        zeros = np.zeros(length, np.int32)
        return Batch(
            np.full(length, self.tokenizer.pad_id, np.int32),
            zeros,
            zeros.copy(),
            np.zeros(length, bool),
            teacher=self.targets and self.targets.empty(length),
        )

    def _no_images(self) -> np.ndarray | None:
        size = self.spec.image_size
        return (
            np.zeros((self.image_slots, size, size, 3), np.uint8)
            if self.spec.image_tokens
            else None
        )

    def _rejected(self, sample: Sample, error: UserError) -> Rejected:
        file, line = self.sources[sample.source].place(sample.record)
        return Rejected(file, line, str(error))


def _num_sides(spec: RowSpec) -> int:
    return 2 if spec.kind == "preference" else 1


def _write(row: Batch, side: Side, targets: CachedTargets | None, start: int, segment: int) -> None:
    at = slice(start, start + len(side.tokens))
    row.tokens[at], row.loss_mask[at] = side
    row.positions[at] = np.arange(len(side.tokens))
    row.segments[at] = segment
    if targets is not None:
        for array, found in zip(row.teacher, targets, strict=True):
            if found is not None:
                array[at] = found


def _read_images(record: AnyRecord, spec: RowSpec) -> list[np.ndarray]:
    return [
        preprocess(read_image(image, spec.images), spec.image_size, spec.images.pad_color)
        for image in record.images
    ]
