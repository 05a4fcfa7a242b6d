"""An extraction: the records of a stage through its teacher, and shards of their targets.

An interrupted extraction continues with the shards that are missing. What a shard contains depends
on teacher and records only, not on batches, devices or processes.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import linen as nn

from moddistill.config import CacheConfig, TrainConfig
from moddistill.data.array_records import ArrayRecordFile
from moddistill.distributed import sharding
from moddistill.distributed.processes import barrier, check_equal_on_all_processes, is_main_process
from moddistill.errors import UserError, at_field
from moddistill.extraction import batches
from moddistill.extraction.plan import Shard, shards_of
from moddistill.extraction.setup import Setup, prepare
from moddistill.extraction.shards import WORK
from moddistill.storage.digests import NAME, verify, write_digests
from moddistill.storage.json_file import read_json, write_json
from moddistill.teachers.cache import SETTINGS, VOCABULARY, describe_changes
from moddistill.training.lock import locked
from moddistill.training.streams import LISTS, remove_lists

LOG = logging.getLogger("moddistill")
BACKENDS = ("jax", "transformers")


def extract(config: TrainConfig, cache: CacheConfig, folder: Path, backend: str = "jax") -> None:
    """Makes the cache of a stage's teacher and records, or continues to; checks a finished one.

    Args:
      backend: one of `BACKENDS`, which runs the teacher.

    Raises:
      UserError: settings, records or teacher do not fit, or the folder has another content.
    """
    check_equal_on_all_processes("settings", repr((config, cache, folder, backend)))
    _check_free(folder)
    with locked(folder / WORK, "--out"), contextlib.ExitStack() as stack:
        with at_field("config.mesh"):
            mesh = sharding.make_mesh(config.mesh)
        if not (folder / SETTINGS).exists():
            remove_lists(folder)
        if backend == "transformers":
            from moddistill.extraction import transformers_run  # noqa: PLC0415  needs torch

            setup, run = transformers_run.prepare(config, cache, folder), transformers_run.run
        else:
            setup, run = prepare(config, cache, mesh, folder), batches.run
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(nn.logical_axis_rules(tuple(sharding.RULES.items())))
        _write_settings(setup, folder)
        shards = _shards(setup)
        missing = [shard for shard in shards if not (folder / shard.name).exists()]
        barrier("listing the shards")  # before any is written, so that all processes see the same
        if is_main_process() and not (folder / NAME).is_file():
            absent = {shard.name for shard in missing}
            _check_entries(setup, [shard for shard in shards if shard.name not in absent], folder)
        barrier("checking the shards")
        if missing:
            run(config, setup, missing, mesh, folder)
        barrier("making the shards")  # of which each process may have written some
        if is_main_process():
            _finish(folder)
        barrier("finishing the cache")
    LOG.info("%s is finished: config.teacher=cache:%s", folder, folder)


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: expected a folder, got the file {str(folder)!r}")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    # Before it has settings, a folder may have the lists or the vocabulary of a failed attempt.
    known = (WORK, VOCABULARY, *LISTS)
    foreign = [name for name in found if name not in known and not name.endswith(".partial")]
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


def _shards(setup: Setup) -> list[Shard]:
    return [
        shard
        for number, (name, source) in enumerate(zip(setup.names, setup.sources, strict=True))
        for shard in shards_of(source, number, name)
    ]


def _check_entries(setup: Setup, shards: Sequence[Shard], folder: Path) -> None:
    """Raises UserError for a shard of an interrupted extraction that was damaged since."""
    for shard in shards:
        file = ArrayRecordFile(str(folder / shard.name))
        try:
            for at in range(shard.size):
                setup.settings.format.unpack(file.read_bytes(at))
        except UserError as error:
            raise UserError(
                f"{file.path}: expected {shard.size} undamaged entries, got {error}; without this "
                "file, the same command makes it again"
            ) from None


def _finish(folder: Path) -> None:
    shutil.rmtree(folder / WORK)
    if (folder / NAME).is_file():
        verify(folder)
    else:
        write_digests(folder, "extract")
