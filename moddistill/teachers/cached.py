"""A teacher whose predictions are in the batch, from a cache; it has no parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moddistill.config import CachedKind
from moddistill.models.batch import Batch
from moddistill.models.logits import MASKED
from moddistill.models.vlm import Output
from moddistill.models.vocabulary import IdRanges, token_mask
from moddistill.teachers.targets import (
    NO_ID,
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
      real_ids: ids of tokens that the teacher might predict when its cache was made.
    """

    kind: CachedKind
    real_ids: IdRanges

    def targets(self, params: Any, batch: Batch, student: Output) -> Targets:
        del params, student
        return Targets(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.teacher))

    def predictions(self, targets: Targets, real_ids: IdRanges) -> Predictions:
        found = targets.per_position
        if self.kind == "answers":
            return LabelLogprobs(found.label_logprobs)
        # Of ids that the student lacks, such as control tokens, both models have no probability.
        shared = jnp.asarray(token_mask(real_ids, real_ids[-1][1]))
        is_shared = jnp.take(shared, found.ids, mode="fill", fill_value=False)
        ids = jnp.where(is_shared, found.ids, NO_ID)
        logprobs = jnp.where(is_shared, found.logprobs, MASKED)
        if self.kind == "samples":
            return Samples(ids, logprobs)
        return TopK(ids, logprobs, found.log_rest)

    def logit_inputs(self, targets: Targets) -> None:
        del targets
