"""An extraction by a teacher in JAX: batches of rows, whose entries fill shard after shard."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from moddistill.config import TrainConfig
from moddistill.data.pipeline import Batches
from moddistill.data.rows import RowMaker, needed_image_slots
from moddistill.distributed import sharding
from moddistill.distributed.processes import is_main_process
from moddistill.extraction.entries import entries_of
from moddistill.extraction.forecast import log_forecast
from moddistill.extraction.plan import Shard, ShardPlan
from moddistill.extraction.program import Extracted, make_extraction
from moddistill.extraction.setup import JaxSetup
from moddistill.extraction.shards import write_shard
from moddistill.teachers.entries import Entry
from moddistill.teachers.live import load_teacher
from moddistill.training.program import teacher_shapes


class _Batch(NamedTuple):
    """A batch that the teacher reads: its first row, and what comes of it."""

    first_row: int
    extracted: Extracted


def run(
    config: TrainConfig, setup: JaxSetup, shards: Sequence[Shard], mesh: Mesh, folder: Path
) -> None:
    """Makes shards of a cache."""
    plan = ShardPlan(setup.sources, shards, config.data.max_length, config.data.packing)
    writer = _ShardWriter(setup, plan, folder)
    with contextlib.closing(_batches(config, setup, plan, mesh, folder)) as batches:
        for batch in _extracted(config, setup, plan, batches, mesh):
            writer.add(batch.first_row, _gathered(batch.extracted))
    writer.close()


def _batches(
    config: TrainConfig, setup: JaxSetup, plan: ShardPlan, mesh: Mesh, folder: Path
) -> Batches:
    slots = needed_image_slots(setup.sources, config.data.packing)
    return Batches(
        RowMaker(plan, setup.sources, setup.tokenizer, setup.spec, slots),
        local_rows=sharding.local_rows(mesh, setup.rows),
        batch_size=setup.rows,
        workers=config.data.workers,
        timeout=config.data.worker_timeout,
        lists=folder,
        max_rejected=config.data.max_rejected,
    )


def _extracted(
    config: TrainConfig, setup: JaxSetup, plan: ShardPlan, batches: Batches, mesh: Mesh
) -> Iterator[_Batch]:
    """Yields the batches one after the other, each while the device computes the next."""
    architecture = setup.model.config
    shapes = teacher_shapes(config, architecture, mesh)
    params = load_teacher(config, setup.teacher, architecture, shapes, mesh)
    run = jax.jit(
        make_extraction(
            setup.model,
            setup.settings.format,
            config.distillation.temperature,
            config.seed,
            config.logits_chunk_size,
        ),
        out_shardings=sharding.batch_sharding(mesh),
    )
    before, begun = None, 0.0
    for first in range(0, plan.starts[-1], setup.rows):
        rows = next(batches)
        if first == setup.rows:  # computed one batch, and waited for the next
            log_forecast(setup, plan, time.monotonic() - begun)
        numbers = _record_numbers(setup, plan, mesh, first)
        arguments = params, *sharding.put_batch(mesh, (rows, numbers))
        if first == 0:
            run = run.lower(*arguments).compile()
            begun = time.monotonic()
        found = _Batch(first, run(*arguments))
        if first == 0:
            jax.block_until_ready(found.extracted)
            if plan.starts[-1] <= setup.rows:  # there is no other batch
                log_forecast(setup, plan, time.monotonic() - begun)
        if before is not None:
            yield before
        before = found
    if before is not None:
        yield before


def _record_numbers(setup: JaxSetup, plan: ShardPlan, mesh: Mesh, first: int) -> np.ndarray:
    """Returns, at each position of this process's rows, a number of its record, int32."""
    local = sharding.local_rows(mesh, setup.rows)
    numbers = np.zeros((len(local), setup.spec.max_length), np.int32)
    for row, number in zip(numbers, local, strict=True):
        cursor = 0
        for sample in plan.row(first + number):
            row[cursor : cursor + sample.length] = setup.record_number(sample.source, sample.record)
            cursor += sample.length
    return numbers


def _gathered(extracted: Extracted) -> Extracted:
    """Returns the arrays of all processes, on the host."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(extracted, tiled=True)
    return jax.device_get(extracted)


class _ShardWriter:
    """Collects entries, and writes each shard when it has all of them."""

    def __init__(self, setup: JaxSetup, plan: ShardPlan, folder: Path):
        self._setup, self._plan, self._folder = setup, plan, folder
        self._entries: dict[int, Entry] = {}  # of the shard in progress, by position in it
        self._current = 0
        total = sum(shard.size for shard in plan.shards)
        self._bar = tqdm(total=total, unit=" records", disable=not is_main_process())
        self._write_until(0)

    def add(self, first_row: int, extracted: Extracted) -> None:
        """Adds the entries of a batch."""
        plan = self._plan
        for row in range(self._setup.rows):
            if first_row + row >= plan.starts[-1]:
                break
            self._write_until(first_row + row)
            samples = plan.row(first_row + row)
            entries = entries_of(extracted, row, samples, self._setup)
            shard = plan.shards[self._current]
            for sample, entry in zip(samples, entries, strict=True):
                self._entries[int(shard.positions[sample.record - shard.first])] = entry
            self._bar.update(len(samples))

    def close(self) -> None:
        self._write_until(None)
        self._bar.close()

    def _write_until(self, row: int | None) -> None:
        """Writes the shards that end before a row; all of them without one."""
        plan = self._plan
        while self._current < len(plan.shards) and (
            row is None or plan.starts[self._current + 1] <= row
        ):
            shard = plan.shards[self._current]
            if is_main_process():
                write_shard(self._folder, shard, self._entries, self._setup.settings.format)
            self._bar.update(shard.size - len(self._entries))  # those left out
            self._entries = {}
            self._current += 1
