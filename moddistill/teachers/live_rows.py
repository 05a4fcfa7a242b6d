"""The samples of rows as a live teacher of another layout reads them.

Template, end token, image size and number of patches may be others than the student's. Tokens of
answers are aligned by their texts, record by record, so that nothing is ever shifted.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moddistill.data.examples import Side, encode_sides
from moddistill.data.image_decoding import ImageRules
from moddistill.data.rows import Encoded, RowSpec, WithoutTargets
from moddistill.data.token_texts import TokenTexts
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError
from moddistill.models.batch import LAST, WITHIN, TeacherRows, make_teacher_rows
from moddistill.teachers.text_chunks import align


class _Places(NamedTuple):
    """Positions of student and teacher that predict the tokens of a chunk.

    Attributes:
      is_token: whether the distributions at the first ones are compared, not the likelihoods.
    """

    student: np.ndarray
    teacher: np.ndarray
    is_token: bool


@dataclasses.dataclass(frozen=True)
class LiveRows:
    """A `TeacherReader` of a live teacher.

    Attributes:
      spec: format of its rows.
      tokenizer, texts: of its tokens.
      student: texts of the student's tokens.
      image_size: 0 if it takes the student's images.
      by_rank: whether only the order of its probabilities counts, as of ULD. Then there are targets
        wherever both read the same text before.
    """

    spec: RowSpec
    tokenizer: Tokenizer
    texts: TokenTexts
    student: TokenTexts
    image_size: int
    by_rank: bool = False

    @property
    def images(self) -> ImageRules:
        return self.spec.images

    def empty(self, length: int) -> TeacherRows:
        rows = make_teacher_rows(np.zeros, (length,), self._is_pair)
        rows.tokens[:] = self.tokenizer.pad_id
        return rows

    def read(self, sample: Encoded) -> list[TeacherRows]:
        spec = self.spec
        sides = encode_sides(sample.record, spec.template, self.tokenizer, spec.image_tokens)
        found = [self._truncated(side, sample) for side in sides]
        rows = [_rows(side.tokens, sample.segment) for side in found]
        try:
            chunks = list(map(self._chunks, sample.sides, found))
        except UserError as error:
            if self._is_pair:  # has no loss without its reference
                raise
            length = len(sample.sides[0].tokens)
            raise WithoutTargets(str(error), [_with_tokens(rows[0], [], length)]) from None
        if self._is_pair:
            return list(map(_with_answer, rows, chunks))
        return [_with_tokens(rows[0], chunks[0], len(sample.sides[0].tokens))]

    @property
    def _is_pair(self) -> bool:
        return self.spec.kind == "preference"

    def _chunks(self, student: Side, teacher: Side) -> list[_Places]:
        """Returns the chunks of the answers of one side, as positions that predict their tokens."""
        mine, its = (np.flatnonzero(side.loss_mask[1:]) for side in (student, teacher))
        found = align(
            self.student.spell(student.tokens[1:][mine]),
            self.texts.spell(teacher.tokens[1:][its]),
        )
        if not found:  # as of one truncated in the first of its tokens on either side
            raise UserError("teacher: expected a token of an answer in both rows, got none")
        return [
            _Places(
                mine[each.student.start : each.student.stop],
                its[each.teacher.start : each.teacher.stop],
                each.is_token or self.by_rank,
            )
            for each in found
        ]

    def _truncated(self, side: Side, sample: Encoded) -> Side:
        length, count = self.spec.max_length, len(side.tokens)
        needed = len(sample.record.images) * self.spec.image_tokens
        found = Side(*(x[:length] for x in side))
        images = int((found.tokens == self.tokenizer.image_id).sum())
        fits = images == needed and found.loss_mask.any()
        if not fits or (self._is_pair and count > length):
            expected = "both answers" if self._is_pair else "all images and an answer token"
            raise UserError(
                f"teacher: expected {expected} within data.max_length {length}, got {count} tokens "
                "as it reads the record"
            )
        return found


def _rows(tokens: np.ndarray, segment: int) -> TeacherRows:
    """Returns the row of one side without any targets."""
    positions = np.arange(len(tokens), dtype=np.int32)
    in_chunk, shift = np.zeros(len(tokens), bool), np.zeros_like(positions)
    return TeacherRows(tokens, positions, np.full_like(positions, segment), in_chunk, shift)


def _with_answer(rows: TeacherRows, places: Sequence[_Places]) -> TeacherRows:
    """Returns the row of a side of a pair: its answer counts at the student's first position."""
    for each in places:
        rows.in_chunk[each.teacher] = True
        rows.chunk_shift[each.teacher] = places[0].student[0] - each.teacher
    return rows


def _with_tokens(rows: TeacherRows, places: Sequence[_Places], length: int) -> TeacherRows:
    """Returns the row with the student's `length` positions, whose tokens the teacher predicts."""
    known, shift, chunk = (np.zeros(length, x) for x in (bool, np.int32, np.int8))
    for ours, theirs, is_token in places:
        if is_token:
            known[ours[0]], shift[ours[0]] = True, theirs[0] - ours[0]
        else:
            chunk[ours], chunk[ours[-1]] = WITHIN, LAST
            rows.in_chunk[theirs], rows.chunk_shift[theirs] = True, ours[-1] - theirs
    return rows._replace(known=known, shift=shift, chunk=chunk)
