"""Losses: `(params, frozen, teacher, batch, rng) -> (scalar, {name: (sum, weight)})`.

Each term is a mean over what it counts in the whole batch (supervised tokens, pairs). A micro-batch
gives its share of these means, so that shares add up to the loss whatever the number of parts. Two
terms are not means and are taken from the statistics of each part: the balance loss, and the KL
estimates of `kto_pair`.
"""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array, Float

from moddistill.models.batch import AnyBatch

Metrics = dict[str, tuple[Array, Array]]
Totals = dict[str, Float[Array, ""]]  # what each term is divided by


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss that can be taken in parts; called, it is that of a whole batch.

    Attributes:
      totals: from a whole batch to the totals of its terms.
      share: `(params, frozen, teacher, part, totals, rng)` to the part's share and metrics, whose
        sums and weights add up over parts too.
    """

    totals: Callable[[AnyBatch], Totals]
    share: Callable[..., tuple[Array, Metrics]]

    def __call__(
        self, params: dict, frozen: dict, teacher: dict | None, batch: AnyBatch, rng: Array
    ) -> tuple[Array, Metrics]:
        return self.share(params, frozen, teacher, batch, self.totals(batch), rng)
