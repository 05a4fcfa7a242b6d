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
from moddistill.models.batch import AnyBatch, Batch, CachedTargets, PreferenceBatch, TeacherRows

OfTeacher = CachedTargets | TeacherRows


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
      without_targets: records without targets of the teacher.
    """

    batch: AnyBatch
    rejected: tuple[Rejected, ...]
    without_targets: tuple[Rejected, ...] = ()


class WithoutTargets(UserError):
    """A record is read, but has no targets of the teacher.

    Attributes:
      instead: what its sides have for a live teacher, which reads its images too.
    """

    def __init__(self, reason: str, instead: "Sequence[OfTeacher] | None" = None):
        super().__init__(reason)
        self.instead = instead


def needed_image_slots(sources: Sequence[Source], packing: bool) -> int:
    """Returns the number of images that a row needs place for, at least 1.

    Of packed rows it follows from the tokens that the records have for each image: with at least r
    of them, a row of T tokens has no more than T / r images.
    """
    if not packing:
        return max(1, *(source.most_images for source in sources))
    return max(1, *(source.most_images_of_rows for source in sources))


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sample as the student reads it.

    Attributes:
      source: its number.
      position: number of the record among all of the source.
      segment: its number in the row.
    """

    source: int
    position: int
    segment: int
    record: AnyRecord
    sides: Sequence[Side]


@runtime_checkable
class TeacherReader(Protocol):
    """What rows have for a teacher; safe in threads and worker processes.

    Attributes:
      image_size: at which the teacher reads images; 0 if it takes those of the student.
      images: how it reads them.
    """

    image_size: int
    images: ImageRules | None

    def empty(self, length: int) -> OfTeacher:
        """Returns what rows of `length` positions without any sample have."""

    def read(self, sample: Encoded) -> Sequence[OfTeacher]:
        """Returns what each side of a sample has, from its first position on.

        Raises:
          WithoutTargets: the teacher has no targets of these answers, which are read without.
          UserError: the same of a pair, or the teacher cannot read the record, which is left out.
        """


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Makes the rows of a plan; safe in threads and worker processes.

    Attributes:
      image_slots: images of a row.
      teacher: what rows have for a teacher, if anything.
    """

    plan: Plan
    sources: Sequence[Source]
    tokenizer: Tokenizer
    spec: RowSpec
    image_slots: int
    teacher: TeacherReader | None = None

    def __call__(self, number: int) -> MadeRow:
        """Reads the records and images of a row."""
        spec, cursor, slot = self.spec, 0, 0
        rejected: list[Rejected] = []
        without_targets: list[Rejected] = []
        sides = [self._empty() for _ in range(_num_sides(spec))]
        pixels = [
            np.zeros((self.image_slots, size, size, 3), np.uint8) for size, _ in self._image_sizes
        ]
        for segment, sample in enumerate(self.plan.row(number), start=1):
            try:
                content, images = self._read(sample, segment)
                of_teacher = self._of_teacher(sample, content, without_targets)
            except UserError as error:
                rejected.append(self._rejected(sample, error))
            else:
                for row, side, more in zip(sides, content.sides, of_teacher, strict=True):
                    _write(row, side, more, cursor, segment)
                for found in images:
                    for array, image in zip(pixels, found, strict=True):
                        array[slot] = image
                    slot += 1
            # A bad sample leaves its place empty, so that nothing else moves.
            cursor += sample.length
        of_images = dict(zip(("images", "teacher_images"), pixels, strict=False))
        if spec.kind == "preference":
            return MadeRow(PreferenceBatch(*sides, **of_images), tuple(rejected))
        batch = sides[0]._replace(**of_images)
        return MadeRow(batch, tuple(rejected), tuple(without_targets))

    def _read(self, sample: Sample, segment: int) -> tuple[Encoded, list[tuple[np.ndarray, ...]]]:
        """Returns a sample, and its images at each size; UserError if it is not as planned."""
        spec, source = self.spec, self.sources[sample.source]
        record = source[sample.record]
        sides = encode_sides(record, spec.template, self.tokenizer, spec.image_tokens)
        sides = [Side(*(x[: spec.max_length] for x in side)) for side in sides]
        length = max(len(side.tokens) for side in sides)
        number = np.array([sample.record])
        [expected], [position] = source.lengths(number).tolist(), source.positions(number).tolist()
        if length != expected:
            raise UserError(
                f"record: expected {expected} tokens as in its index, got {length}; the file "
                "has changed, or an image in it is empty"
            )
        sizes = [_read_images(record, *size) for size in self._image_sizes]
        encoded = Encoded(sample.source, position, segment, record, sides)
        return encoded, list(zip(*sizes, strict=True))

    @property
    def _image_sizes(self) -> list[tuple[int, ImageRules]]:
        """The sizes at which images are read, of the student and of a teacher with another one."""
        if not self.spec.image_tokens:
            return []
        sizes = [(self.spec.image_size, self.spec.images)]
        if self.teacher is not None and self.teacher.image_size:
            sizes.append((self.teacher.image_size, self.teacher.images))
        return sizes

    def _of_teacher(
        self, sample: Sample, encoded: Encoded, without_targets: list[Rejected]
    ) -> Sequence[OfTeacher | None]:
        """Returns what a sample has for the teacher; one without goes to `without_targets`."""
        nothing = [None] * len(encoded.sides)
        if self.teacher is None:
            return nothing
        try:
            return self.teacher.read(encoded)
        except WithoutTargets as error:
            without_targets.append(self._rejected(sample, error))
            return error.instead or nothing

    def _empty(self) -> Batch:
        length = self.spec.max_length
        zeros = np.zeros(length, np.int32)
        return Batch(
            np.full(length, self.tokenizer.pad_id, np.int32),
            zeros,
            zeros.copy(),
            np.zeros(length, bool),
            teacher=self.teacher and self.teacher.empty(length),
        )

    def _rejected(self, sample: Sample, error: UserError) -> Rejected:
        file, line = self.sources[sample.source].place(sample.record)
        return Rejected(file, line, str(error))


def _num_sides(spec: RowSpec) -> int:
    return 2 if spec.kind == "preference" else 1


def _write(row: Batch, side: Side, of_teacher: OfTeacher | None, start: int, segment: int) -> None:
    at = slice(start, start + len(side.tokens))
    row.tokens[at], row.loss_mask[at] = side
    row.positions[at] = np.arange(len(side.tokens))
    row.segments[at] = segment
    if of_teacher is not None:
        for array, found in zip(row.teacher, of_teacher, strict=True):
            if found is not None:
                array[start : start + len(found)] = found


def _read_images(record: AnyRecord, size: int, rules: ImageRules) -> list[np.ndarray]:
    return [preprocess(read_image(image, rules), size, rules.pad_color) for image in record.images]
