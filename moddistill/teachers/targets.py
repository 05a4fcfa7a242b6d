"""The contract between teachers and losses: what a loss may know of a teacher."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from moddistill.models.batch import Batch
from moddistill.models.logits import LogitInputs
from moddistill.models.vlm import Output
from moddistill.models.vocabulary import IdRanges


class Targets(NamedTuple):
    """The teacher's predictions at all positions of a batch, as arrays of any kind.

    Losses slice, reorder and shard `per_position` together with the positions and replicate
    `shared`. Only the teacher that made them knows their meaning.

    Attributes:
      per_position: pytree of arrays `[T, ...]`, one row for each of the batch's `B * T` positions:
        hidden states of a live teacher, token ids and log-probabilities of a cached one.
      shared: pytree of arrays that all positions need, such as the teacher's head.
      chunk_logprobs: log-likelihood of each chunk of text at its last token; None if all tokens
        are those of the student.
    """

    per_position: Any = None
    shared: Any = None
    chunk_logprobs: Float[Array, "B T"] | None = None


NO_TARGETS = Targets()


NO_ID = 2**31 - 1  # beyond any vocabulary: in the place of an id without probability


class FullLogits(NamedTuple):
    """Predictions over all ids: float32 logits, in which ids that are no tokens are masked."""

    logits: Float[Array, "C V"]


class TopK(NamedTuple):
    """Log-probabilities of some ids, and of all others together: one bucket.

    The log-probability of `NO_ID` is masked. With `classes`, an id stands for all those of the
    student that have it there.
    """

    ids: Int[Array, "C K"]
    logprobs: Float[Array, "C K"]
    log_rest: Float[Array, "C"]
    classes: Int[Array, "N"] | None = None


class Samples(NamedTuple):
    """Ids drawn from the teacher's distribution with replacement, and their log-probabilities.

    `NO_ID` is none of them, and its log-probability is masked.
    """

    ids: Int[Array, "C K"]
    logprobs: Float[Array, "C K"]


class LabelLogprobs(NamedTuple):
    """Log-probabilities whose sum over an answer is its log-likelihood, and nothing else."""

    logprobs: Float[Array, "C"]


Predictions = FullLogits | TopK | Samples | LabelLogprobs


@runtime_checkable
class Teacher(Protocol):
    """How a loss obtains targets, once per batch, and reads them, chunk by chunk."""

    @property
    def real_ids(self) -> IdRanges:
        """Ids of tokens that the teacher may predict."""

    def targets(self, params: Any, batch: Batch, student: Output) -> Targets:
        """Returns the targets of a batch, which have no gradient.

        Args:
          params: what the step gets as `teacher`, or None.
          student: the student's output for the same batch, whose image features may be reused.
        """

    def predictions(self, targets: Targets, real_ids: IdRanges) -> Predictions:
        """Returns predictions at the C positions of `targets`, over the ids in `real_ids`."""

    def logit_inputs(self, targets: Targets) -> LogitInputs | None:
        """Returns the factors of the logits at all positions of `targets`, if they are known."""
