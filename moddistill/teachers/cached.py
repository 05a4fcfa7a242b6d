"""A teacher whose predictions are in the batch, from a cache; it has no parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moddistill.config import CachedKind
from moddistill.models.batch import Batch
from moddistill.models.vlm import Output
from moddistill.models.vocabulary import IdRanges
from moddistill.teachers.targets import (
    LabelLogprobs,
    Predictions,
    Samples,
    Targets,
    TopK,
)


@dataclasses.dataclass(frozen=True)
class CachedTeacher:
    """A `Teacher` that reads its targets from the `teacher` field of a batch.

    Attributes:
      kind: what its cache has of each supervised token.
      real_ids: the student's ids of tokens that the teacher might predict.
      classes: of each id of the student, the id that stands for it in the cache's targets; None if
        each stands for itself.
    """

    kind: CachedKind
    real_ids: IdRanges
    classes: np.ndarray | None = dataclasses.field(default=None, compare=False)

    def targets(self, params: Any, batch: Batch, student: Output) -> Targets:
        del params, student
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.teacher)
        return Targets(flat, chunk_logprobs=batch.teacher.chunk_logprobs)

    def predictions(self, targets: Targets, real_ids: IdRanges) -> Predictions:
        del real_ids  # ids that the student lacks have no place in the batch
        found = targets.per_position
        if self.kind == "answers":
            return LabelLogprobs(found.label_logprobs)
        if self.kind == "samples":
            return Samples(found.ids, found.logprobs)
        classes = None if self.classes is None else jnp.asarray(self.classes)
        return TopK(found.ids, found.logprobs, found.log_rest, classes)

    def logit_inputs(self, targets: Targets) -> None:
        del targets
