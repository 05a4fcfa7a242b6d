"""Means of a stage's metrics over held-out records, after its last step."""

import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moddistill.config import TrainConfig
from moddistill.distributed import sharding
from moddistill.training.loading import Run
from moddistill.training.metrics import weighted_means
from moddistill.training.state import State

LOG = logging.getLogger("moddistill")


def evaluate_heldout(
    config: TrainConfig, run: Run, state: State, records: Iterator[Any], mesh: Mesh
) -> dict[str, float]:
    """Returns means of the stage's metrics over `heldout_steps` batches, as `heldout_NAME`."""
    loss = jax.jit(run.loss.__call__)
    rng = jax.random.key(config.seed)
    metrics = []
    for _ in range(config.heldout_steps):
        # Metrics are sums and weights, so that micro-batches add up to their batch.
        for part in _micro_batches(next(records), config.grad_accum_steps):
            batch = sharding.put_batch(mesh, part)
            metrics.append(loss(state.params, state.frozen, run.teacher, batch, rng)[1])
    means = weighted_means(jax.device_get(metrics))
    means = {f"heldout_{name}": mean for name, mean in means.items()}
    LOG.info("held out: %s", ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    return means


def _micro_batches(batch: Any, count: int) -> Iterator[Any]:
    """Splits a batch into equal parts, each of which fits into memory as in training."""
    for i in range(count):
        yield jax.tree.map(lambda x, i=i: np.split(x, count)[i], batch)
