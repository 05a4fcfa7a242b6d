"""The samples of rows as a live teacher of another layout reads them.

Template, end token, image size and number of patches may be others than the student's. Tokens of
answers are aligned by their texts, record by record, so that nothing is ever shifted.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moddistill.data.examples import Side, encode_sides
from moddistill.data.image_decoding import ImageRules
from moddistill.data.rows import Encoded, RowSpec, WithoutTargets
from moddistill.data.token_texts import TokenTexts
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError
from moddistill.models.batch import LAST, WITHIN, TeacherRows, make_teacher_rows
from moddistill.teachers.text_chunks import Chunk, align


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
        try:
            sides = encode_sides(sample.record, spec.template, self.tokenizer, spec.image_tokens)
            pairs = zip(sample.sides, sides, strict=True)
            return [self._read(mine, its, sample) for mine, its in pairs]
        except UserError as error:
            if self._is_pair:  # has no loss without its reference
                raise
            raise WithoutTargets(f"teacher: {error}") from None

    @property
    def _is_pair(self) -> bool:
        return self.spec.kind == "preference"

    def _read(self, student: Side, teacher: Side, sample: Encoded) -> TeacherRows:
        """Returns the row of one side; its arrays are as long as the side of which they tell."""
        tokens, loss_mask = self._truncated(teacher, sample)
        # A position predicts the token after it.
        mine, its = (np.flatnonzero(mask[1:]) for mask in (student.loss_mask, loss_mask))
        chunks = align(
            self.student.spell(student.tokens[1:][mine]), self.texts.spell(tokens[1:][its])
        )
        positions = np.arange(len(tokens), dtype=np.int32)
        in_chunk, shift = np.zeros(len(tokens), bool), np.zeros(len(tokens), np.int32)
        rows = TeacherRows(
            tokens, positions, np.full_like(positions, sample.segment), in_chunk, shift
        )
        if self._is_pair:
            in_chunk[its], shift[its] = True, mine[0] - its
            return rows
        if self.by_rank:
            chunks = [each._replace(is_token=True) for each in chunks]
        return _with_tokens(rows, chunks, mine, its, len(student.tokens))

    def _truncated(self, side: Side, sample: Encoded) -> Side:
        length, count = self.spec.max_length, len(side.tokens)
        needed = len(sample.record.images) * self.spec.image_tokens
        found = int((side.tokens[:length] == self.tokenizer.image_id).sum())
        if found < needed or (self._is_pair and count > length):
            expected = "both answers" if self._is_pair else "all images"
            raise UserError(
                f"tokens: expected {expected} within data.max_length {length}, got {count} tokens "
                "as the teacher reads the record"
            )
        return Side(*(x[:length] for x in side))


def _with_tokens(
    rows: TeacherRows, chunks: Sequence[Chunk], mine: np.ndarray, its: np.ndarray, length: int
) -> TeacherRows:
    """Returns rows with the student's positions whose tokens the teacher predicts, of a length."""
    known, shift, chunk = (np.zeros(length, x) for x in (bool, np.int32, np.int8))
    for each in chunks:
        ours, theirs = (
            at[span.start : span.stop] for at, span in ((mine, each.student), (its, each.teacher))
        )
        if each.is_token:
            known[ours[0]], shift[ours[0]] = True, theirs[0] - ours[0]
        else:
            chunk[ours], chunk[ours[-1]] = WITHIN, LAST
            rows.in_chunk[theirs], rows.chunk_shift[theirs] = True, ours[-1] - theirs
    return rows._replace(known=known, shift=shift, chunk=chunk)
