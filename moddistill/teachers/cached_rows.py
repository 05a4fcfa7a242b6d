"""Targets of a cache at the positions of the samples that a student reads."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moddistill.data.examples import Side
from moddistill.errors import UserError
from moddistill.models.batch import CachedTargets, make_targets
from moddistill.teachers.cache import TeacherCache
from moddistill.teachers.entries import TokenTargets, text_digest


@dataclasses.dataclass(frozen=True)
class CachedRows:
    """A `TargetReader` of a cache.

    Attributes:
      names: of the sources, in the order of their numbers.
    """

    cache: TeacherCache
    names: tuple[str, ...]

    def empty(self, length: int) -> CachedTargets:
        return make_targets(np.zeros, (length,), self.cache.shape)

    def read(self, source: int, position: int, sides: Sequence[Side]) -> list[CachedTargets]:
        predicted = [np.flatnonzero(side.loss_mask[1:]) for side in sides]
        entry = self.cache.entry(self.names[source], position)
        if entry.targets is None:
            raise UserError(f"teacher cache: expected targets, got none: {entry.reason}")
        pairs = zip(sides, predicted, strict=True)
        if entry.digest != text_digest(*(side.tokens[1:][at] for side, at in pairs)):
            raise UserError(
                "teacher cache: expected targets of the supervised tokens of this record, got "
                "those of other tokens"
            )
        found = [self.empty(len(side.tokens)) for side in sides]
        for number, (targets, at) in enumerate(zip(found, predicted, strict=True)):
            if self.cache.shape.kind == "answers":
                targets.known[at[:1]] = True
                targets.label_logprobs[at[:1]] = entry.targets.label_logprobs[number]
            else:
                _write(targets, at, entry.targets)
        return found


def _write(row: CachedTargets, at: np.ndarray, targets: TokenTargets) -> None:
    row.known[at] = True
    row.ids[at] = targets.ids
    row.logprobs[at] = targets.logprobs
    if row.log_rest is not None:
        row.log_rest[at] = targets.log_rest
