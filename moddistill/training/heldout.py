"""Means of a stage's metrics over held-out records."""

import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moddistill.config import TrainConfig
from moddistill.data.pipeline import Batches
from moddistill.distributed import sharding
from moddistill.errors import not_one_of
from moddistill.training.interruption import Stops, Waiting
from moddistill.training.loading import Run
from moddistill.training.metrics import HELDOUT, weighted_means
from moddistill.training.state import State

LOG = logging.getLogger("moddistill")


class Heldout:
    """Held-out records: `heldout(state, stops)` returns means of the stage's metrics over them.

    Each call reads the same `heldout_steps` batches. Names are `heldout_NAME`.
    """

    prefix = HELDOUT

    def __init__(self, config: TrainConfig, run: Run, records: Batches, mesh: Mesh):
        self._config, self._run, self._records, self._mesh = config, run, records, mesh
        self._loss = jax.jit(run.loss.__call__)

    def check_name(self, name: str, state: State, batch: Any) -> None:
        """Raises UserError if `config.keep_best` is not a metric; computes nothing."""
        rng = jax.random.key(0)
        arguments = (state.params, state.frozen, self._run.teacher, batch, rng)
        names = jax.eval_shape(self._run.loss.__call__, *arguments)[1]
        if name not in names:
            raise not_one_of("config.keep_best", name, sorted(names))

    def is_due(self, step: int) -> bool:
        """Returns whether the records are evaluated after a step."""
        every = self._config.heldout_every
        return step == self._config.steps or (every > 0 and step % every == 0)

    def __call__(self, state: State, stops: Stops) -> dict[str, float] | None:
        """Returns the means; None if a signal comes before the last batch."""
        rng = jax.random.key(self._config.seed)
        metrics = []
        self._records.seek(0)
        for _ in range(self._config.heldout_steps):
            try:
                rows = stops.wait(self._records.__next__)
            except Waiting:
                self._records.close()
                return None
            # Metrics are sums and weights, so that micro-batches add up to their batch.
            for part in _micro_batches(rows, self._config.grad_accum_steps):
                batch = sharding.put_batch(self._mesh, part)
                found = self._loss(state.params, state.frozen, self._run.teacher, batch, rng)
                metrics.append(found[1])
            jax.block_until_ready(metrics[-1])  # or a signal would wait for all that is dispatched
        self._records.close()
        means = weighted_means(jax.device_get(metrics))
        means = {f"{HELDOUT}{name}": mean for name, mean in means.items()}
        LOG.info("held out: %s", ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
        return means


def _micro_batches(batch: Any, count: int) -> Iterator[Any]:
    """Splits a batch into equal parts, each of which fits into memory as in training."""
    for i in range(count):
        yield jax.tree.map(lambda x, i=i: np.split(x, count)[i], batch)
