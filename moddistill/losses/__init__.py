"""Losses: `(params, frozen, teacher, batch, rng) -> (scalar, {name: (sum, weight)})`.

Each term is a mean over what it counts in the global batch (tokens, images, pairs): a sum divided
by a denominator. With N of the global batch and micro-batches k,

    loss = sum_k loss_k,   loss_k = (sum of the values in k) / N,

so that gradients of micro-batches add up to that of the batch, however it is split. Two terms are
no means over tokens and are computed from the statistics of each micro-batch: the load-balance
loss, and the KL estimates of `kto_pair`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from moddistill.models.batch import AnyBatch

Metrics = dict[str, tuple[Array, Array]]  # of each name a sum and its weight
Denominators = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss that can be computed in micro-batches; called, it is that of a full batch.

    Attributes:
      denominators: from a full batch to what the sum of each term is divided by.
      micro_batch: `(params, frozen, teacher, batch, denominators, rng)` to the loss of a
        micro-batch and its metrics; both add up over micro-batches.
    """

    denominators: Callable[[AnyBatch], Denominators]
    micro_batch: Callable[..., tuple[Array, Metrics]]

    def __call__(
        self, params: dict, frozen: dict, teacher: Any, batch: AnyBatch, rng: Array
    ) -> tuple[Array, Metrics]:
        """Returns the scalar loss and its metrics.

        Args:
          params: trainable parameters by path, float32.
          frozen: all other parameters of the student by path.
          teacher: parameters of a live teacher, or None.
        """
        return self.micro_batch(params, frozen, teacher, batch, self.denominators(batch), rng)
