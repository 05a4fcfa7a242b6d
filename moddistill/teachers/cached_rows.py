"""Targets of a cache at the positions of the samples that a student reads."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moddistill.data.examples import Side
from moddistill.data.rows import Encoded, WithoutTargets
from moddistill.data.token_texts import TokenTexts
from moddistill.errors import UserError
from moddistill.models.batch import LAST, WITHIN, CachedTargets, make_targets
from moddistill.models.logits import MASKED
from moddistill.teachers.alignment import IdMap
from moddistill.teachers.cache import TeacherCache
from moddistill.teachers.entries import TokenTargets, text_digest
from moddistill.teachers.targets import NO_ID
from moddistill.teachers.text_chunks import Chunk, align


@dataclasses.dataclass(frozen=True)
class CachedRows:
    """A `TeacherReader` of a cache.

    Attributes:
      names: of the sources, in the order of their numbers.
      ids: from the teacher's ids to those of the student.
      student: the texts of its tokens.
      by_rank: whether only the order of the teacher's probabilities counts, as of ULD. Then they
        are those of its own ids, wherever both read the same text before.
    """

    cache: TeacherCache
    names: tuple[str, ...]
    ids: IdMap
    student: TokenTexts
    by_rank: bool = False
    image_size: int = 0
    images: None = None

    def empty(self, length: int) -> CachedTargets:
        return make_targets(np.zeros, (length,), self.cache.shape)

    def read(self, sample: Encoded) -> list[CachedTargets]:
        is_pair, sides = self.cache.shape.kind == "answers", sample.sides
        try:
            entry = self.cache.entry(self.names[sample.source], sample.position)
            if entry.targets is None:
                raise UserError(f"teacher cache: expected targets, got none: {entry.reason}")
            if is_pair:
                return self._of_pair(sides, entry.targets, entry.digest)
            return [self._of_tokens(sides[0], entry.targets)]
        except UserError as error:
            if is_pair:  # has no loss without its reference
                raise
            raise WithoutTargets(str(error)) from None

    def _of_pair(
        self, sides: Sequence[Side], targets: TokenTargets, digest: bytes
    ) -> list[CachedTargets]:
        texts = [self.student.spell(side.tokens[side.loss_mask]) for side in sides]
        if digest != text_digest(*texts):
            raise UserError(
                "teacher cache: expected the log-likelihoods of these answers, got those of others"
            )
        found = [self.empty(len(side.tokens)) for side in sides]
        for number, (side, row) in enumerate(zip(sides, found, strict=True)):
            first = np.flatnonzero(side.loss_mask[1:])[:1]
            row.known[first] = True
            row.label_logprobs[first] = targets.label_logprobs[number]
        return found

    def _of_tokens(self, side: Side, targets: TokenTargets) -> CachedTargets:
        row = self.empty(len(side.tokens))
        predicted = np.flatnonzero(side.loss_mask[1:])
        labels = side.tokens[1:][predicted]
        if self.ids.is_shared and np.array_equal(self.ids.to_student[targets.labels], labels):
            self._write(row, predicted, targets)
            return row
        texts = self.cache.texts.spell(targets.labels)
        chunks = align(self.student.spell(labels), texts)
        tokens = [chunk for chunk in chunks if self._is_compared(chunk, labels, targets.labels)]
        at = predicted[[chunk.student.start for chunk in tokens]]
        self._write(row, at, _select(targets, [chunk.teacher.start for chunk in tokens]))
        for chunk in chunks:
            if not (chunk.is_token or self.by_rank):
                at = predicted[chunk.student.start : chunk.student.stop]
                row.chunk[at] = WITHIN
                row.chunk[at[-1]] = LAST
                of_chunk = targets.label_logprobs[chunk.teacher.start : chunk.teacher.stop]
                row.chunk_logprobs[at[-1]] = of_chunk.sum()
        return row

    def _is_compared(self, chunk: Chunk, labels: np.ndarray, teacher: np.ndarray) -> bool:
        """Returns whether the distributions at the first tokens of a chunk are compared."""
        if self.by_rank:
            return True
        if self.ids.classes is None:
            return chunk.is_token
        mine, other = labels[chunk.student.start], teacher[chunk.teacher.start]
        return chunk.begins_alike and bool(self.ids.classes[mine] == self.ids.to_student[other])

    def _write(self, row: CachedTargets, at: np.ndarray, targets: TokenTargets) -> None:
        row.known[at] = True
        if self.by_rank:
            row.logprobs[at], row.log_rest[at] = targets.logprobs, targets.log_rest
            return
        ids, logprobs = self.ids.to_student[targets.ids], targets.logprobs
        is_absent = ids == NO_ID
        if self.ids.classes is not None:
            ids, logprobs = _of_classes(ids, logprobs)
        row.ids[at] = ids
        row.logprobs[at] = np.where(ids == NO_ID, MASKED, logprobs)
        if row.log_rest is None:
            return
        row.log_rest[at] = targets.log_rest
        if not self.ids.is_shared and is_absent.any():
            # Texts that no token of the student has are among the others.
            absent = np.where(is_absent, targets.logprobs, MASKED)
            others = np.logaddexp.reduce(absent, axis=1)
            row.log_rest[at] = np.logaddexp(targets.log_rest, others)


def _of_classes(ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each class once, at its first id [N, K], with the probability of all of its ids."""
    same = ids[:, :, None] == ids[:, None, :]
    sums = np.logaddexp.reduce(np.where(same, logprobs[:, None, :], MASKED), axis=2)
    is_first = np.argmax(same, axis=2) == np.arange(ids.shape[1])
    return np.where(is_first, ids, NO_ID), sums.astype(np.float32)


def _select(targets: TokenTargets, at: Sequence[int]) -> TokenTargets:
    return TokenTargets(*(None if x is None else x[np.asarray(at, int)] for x in targets))
