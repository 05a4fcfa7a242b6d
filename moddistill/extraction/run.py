"""An extraction: batches of records through the teacher, and shards of their targets.

An interrupted extraction continues with the shards that are missing. What a shard contains depends
on teacher and records only, not on batches, devices or processes.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from moddistill.config import CacheConfig, TrainConfig
from moddistill.data.array_records import writing_records
from moddistill.data.pipeline import Batches
from moddistill.data.rows import RowMaker, needed_image_slots
from moddistill.distributed import sharding
from moddistill.distributed.processes import barrier, check_equal_on_all_processes, is_main_process
from moddistill.errors import UserError, at_field
from moddistill.extraction.entries import entries_of
from moddistill.extraction.forecast import log_forecast
from moddistill.extraction.plan import Shard, ShardPlan, shards_of
from moddistill.extraction.program import Extracted, make_extraction
from moddistill.extraction.setup import Setup, prepare
from moddistill.storage.digests import NAME, verify, write_digests
from moddistill.storage.json_file import read_json, write_json
from moddistill.teachers.cache import SETTINGS, VOCABULARY, describe_changes
from moddistill.teachers.entries import Entry
from moddistill.teachers.live import load_teacher
from moddistill.training.lock import locked
from moddistill.training.program import teacher_shapes
from moddistill.training.streams import LISTS, remove_lists

LOG = logging.getLogger("moddistill")
_WORK = ".work"


def extract(config: TrainConfig, cache: CacheConfig, folder: Path) -> None:
    """Makes the cache of a stage's teacher and records, or continues to; checks a finished one.

    Raises:
      UserError: settings, records or teacher do not fit, or the folder has another content.
    """
    check_equal_on_all_processes("settings", repr((config, cache, folder)))
    _check_free(folder)
    with locked(folder / _WORK, "--out"), contextlib.ExitStack() as stack:
        with at_field("config.mesh"):
            mesh = sharding.make_mesh(config.mesh)
        if not (folder / SETTINGS).exists():
            remove_lists(folder)
        setup = prepare(config, cache, mesh, folder)
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(nn.logical_axis_rules(tuple(sharding.RULES.items())))
        _write_settings(setup, folder)
        if missing := _missing(setup, folder):
            _run(config, setup, missing, mesh, folder)
        if is_main_process():
            _finish(folder)
        barrier("finishing the cache")
    LOG.info("%s is finished: config.teacher=cache:%s", folder, folder)


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: expected a folder, got the file {str(folder)!r}")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    # Before it has settings, a folder may have the lists of records of an attempt that failed.
    foreign = [name for name in found if name not in (_WORK, *LISTS)]
    if foreign and SETTINGS not in found:
        raise UserError(
            f"--out: expected an empty folder or one that extract made, got {str(folder)!r} with "
            f"{foreign[0]!r}"
        )


def _write_settings(setup: Setup, folder: Path) -> None:
    """Writes `cache.json` and the vocabulary; UserError if the folder is of other settings."""
    settings = dataclasses.asdict(setup.settings)
    if (folder / SETTINGS).exists():
        if changed := describe_changes(read_json(folder / SETTINGS), settings):
            raise UserError(
                f"--out: expected a folder begun with the same settings and records, got "
                f"{str(folder)!r} and {changed}"
            )
    elif is_main_process():
        setup.texts.save(folder / VOCABULARY)
        write_json(folder / SETTINGS, settings)
    barrier("writing the settings of the cache")


def _missing(setup: Setup, folder: Path) -> list[Shard]:
    """Returns the shards that are not there yet."""
    return [
        shard
        for number, (name, source) in enumerate(zip(setup.names, setup.sources, strict=True))
        for shard in shards_of(source, number, name)
        if not (folder / shard.name).exists()
    ]


def _finish(folder: Path) -> None:
    shutil.rmtree(folder / _WORK)
    if (folder / NAME).is_file():
        verify(folder)
    else:
        write_digests(folder, "extract")


class _Batch(NamedTuple):
    """A batch that the teacher reads: its first row, and what comes of it."""

    first_row: int
    extracted: Extracted


def _run(
    config: TrainConfig, setup: Setup, shards: Sequence[Shard], mesh: Mesh, folder: Path
) -> None:
    plan = ShardPlan(setup.sources, shards, config.data.max_length, config.data.packing)
    writer = _ShardWriter(setup, plan, folder)
    with contextlib.closing(_batches(config, setup, plan, mesh, folder)) as batches:
        for batch in _extracted(config, setup, plan, batches, mesh):
            writer.add(batch.first_row, _gathered(batch.extracted))
    writer.close()


def _batches(
    config: TrainConfig, setup: Setup, plan: ShardPlan, mesh: Mesh, folder: Path
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
    config: TrainConfig, setup: Setup, plan: ShardPlan, batches: Batches, mesh: Mesh
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
    before = None
    for first in range(0, plan.starts[-1], setup.rows):
        numbers = _record_numbers(setup, plan, mesh, first)
        arguments = params, *sharding.put_batch(mesh, (next(batches), numbers))
        if first == 0:
            log_forecast(setup, plan, run, arguments)
        found = _Batch(first, run(*arguments))
        if before is not None:
            yield before
        before = found
    if before is not None:
        yield before


def _record_numbers(setup: Setup, plan: ShardPlan, mesh: Mesh, first: int) -> np.ndarray:
    """Returns, at each position of this process's rows, a number of its record, int32."""
    local = sharding.local_rows(mesh, setup.rows)
    numbers = np.zeros((len(local), setup.spec.max_length), np.int32)
    for row, number in zip(numbers, local, strict=True):
        cursor = 0
        for sample in plan.row(first + number):
            row[cursor : cursor + sample.length] = setup.record_number(sample)
            cursor += sample.length
    return numbers


def _gathered(extracted: Extracted) -> Extracted:
    """Returns the arrays of all processes, on the host."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(extracted, tiled=True)
    return jax.device_get(extracted)


class _ShardWriter:
    """Collects entries, and writes each shard when it has all of them."""

    def __init__(self, setup: Setup, plan: ShardPlan, folder: Path):
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
                self._write(shard)
            self._bar.update(shard.size)
            self._entries = {}
            self._current += 1

    def _write(self, shard: Shard) -> None:
        partial = self._folder / _WORK / shard.name
        absent = Entry(None, "left out of the teacher's records")
        with writing_records(partial) as write:
            for position in range(shard.size):
                entry = self._entries.get(position, absent)
                write(self._setup.settings.format.pack(entry))
        partial.rename(self._folder / shard.name)
