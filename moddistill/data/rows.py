"""Rows of a batch from planned samples: arrays of one fixed shape, without axis B.

T: max_length, I: `needed_image_slots`, h = w: image_size.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moddistill.data.examples import Side, encode_sides
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import preprocess, read_image
from moddistill.data.packing import RowPlan, Sample
from moddistill.data.quarantine import Rejected
from moddistill.data.records import AnyRecord
from moddistill.data.sources import Source
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError
from moddistill.models.batch import AnyBatch, Batch, PreferenceBatch


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
    """A row, and the records that turned out bad: their tokens are padding."""

    batch: AnyBatch
    rejected: tuple[Rejected, ...]


def needed_image_slots(sources: Sequence[Source], packing: bool) -> int:
    """Returns the number of images that a row needs place for, at least 1.

    Of packed rows it follows from the tokens that the records have for each image: with at least r
    of them, a row of T tokens has no more than T / r images.
    """
    if not packing:
        return max(1, *(source.most_images for source in sources))
    return max(1, *(source.most_images_of_rows for source in sources))


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Makes the rows of a plan; safe in threads and worker processes.

    Attributes:
      image_slots: images of a row.
    """

    plan: RowPlan
    sources: Sequence[Source]
    tokenizer: Tokenizer
    spec: RowSpec
    image_slots: int

    def __call__(self, number: int) -> MadeRow:
        """Reads the records and images of a row."""
        spec, rejected, cursor, slot = self.spec, [], 0, 0
        sides = [_empty(spec, self.tokenizer.pad_id) for _ in range(_num_sides(spec))]
        pixels = self._no_images()
        for segment, sample in enumerate(self.plan.row(number), start=1):
            try:
                content, images = self._read(sample)
            except UserError as error:
                rejected.append(self._rejected(sample, error))
            else:
                for row, side in zip(sides, content, strict=True):
                    _write(row, side, cursor, segment)
                for image in images:
                    pixels[slot] = image
                    slot += 1
            # A bad sample leaves its place empty, so that nothing else moves.
            cursor += sample.length
        if spec.kind == "preference":
            return MadeRow(PreferenceBatch(*sides, images=pixels), tuple(rejected))
        return MadeRow(sides[0]._replace(images=pixels), tuple(rejected))

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


def _empty(spec: RowSpec, pad_id: int) -> Batch:
    shape = spec.max_length
    zeros = np.zeros(shape, np.int32)
    return Batch(np.full(shape, pad_id, np.int32), zeros, zeros.copy(), np.zeros(shape, bool))


def _write(row: Batch, side: Side, start: int, segment: int) -> None:
    at = slice(start, start + len(side.tokens))
    row.tokens[at], row.loss_mask[at] = side
    row.positions[at] = np.arange(len(side.tokens))
    row.segments[at] = segment


def _read_images(record: AnyRecord, spec: RowSpec) -> list[np.ndarray]:
    return [
        preprocess(read_image(image, spec.images), spec.image_size, spec.images.pad_color)
        for image in record.images
    ]
