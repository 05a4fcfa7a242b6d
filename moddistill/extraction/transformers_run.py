"""An extraction by a teacher of `transformers`, one shard after the other."""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from moddistill.config import CacheConfig, TrainConfig
from moddistill.convert.hub import local_folder
from moddistill.convert.resolve import resolve
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import read_image
from moddistill.distributed.processes import is_main_process
from moddistill.errors import UserError, at_field
from moddistill.extraction.forecast import log_forecast_of
from moddistill.extraction.plan import Shard
from moddistill.extraction.setup import Setup, check_stage, entry_format, open_records
from moddistill.extraction.shards import write_shard
from moddistill.extraction.transformers_teacher import HowToRead, ReadRecord, TransformersTeacher
from moddistill.teachers.cache import CacheSettings, TeacherIdentity, fingerprint_of
from moddistill.teachers.entries import Entry
from moddistill.training.architectures import student_of
from moddistill.training.streams import row_spec
from moddistill.training.validation import check_settings

LOG = logging.getLogger("moddistill")
_READ = 2**20  # bytes of a file that identify it, together with its size


@dataclasses.dataclass(frozen=True)
class TransformersSetup(Setup):
    """An extraction by a teacher of `transformers`."""

    teacher: TransformersTeacher
    images: ImageRules


def prepare(config: TrainConfig, cache: CacheConfig, folder: Path) -> TransformersSetup:
    """Loads the teacher and opens the records that the student reads.

    Raises:
      UserError: naming the setting of a teacher, a student or records that do not fit.
    """
    check_settings(config)
    check_stage(config)
    student, tokenizer = student_of(config)
    tower = student.config.vision
    if config.vision:
        with at_field("config.vision"):
            tower = resolve(config.vision, tokenizer).config.vision
    spec = row_spec(config, config.data, tower)
    names, opened = open_records(config, config.data, spec, tokenizer, folder)
    how = HowToRead(
        config.dtype, config.distillation.temperature, config.seed, config.logits_chunk_size
    )
    with at_field("config.teacher"):
        source = local_folder(config.teacher)
        teacher = TransformersTeacher(source, how)
        texts = teacher.tokens.texts
    identity = TeacherIdentity(
        config.teacher,
        _digest(source),
        hashlib.sha256(repr(texts).encode()).hexdigest(),
        "chat template of the teacher",
        {"processor": "of the teacher"},
    )
    fingerprint = fingerprint_of(config, spec.kind, dict(zip(names, opened, strict=True)))
    return TransformersSetup(
        texts=texts,
        settings=CacheSettings(
            entry_format(config, cache, teacher.real_ids), config.seed, identity, fingerprint
        ),
        names=names,
        sources=opened,
        rows=config.batch_size // config.grad_accum_steps,
        teacher=teacher,
        images=spec.images,
    )


def _digest(folder: Path) -> str:
    """Returns a digest of the names, sizes and beginnings of a model's files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + stream.read(_READ))
    return digest.hexdigest()


def run(
    config: TrainConfig, setup: TransformersSetup, shards: Sequence[Shard], mesh: Any, folder: Path
) -> None:
    """Makes shards of a cache; processes take turns at them."""
    del config, mesh
    mine = shards[jax.process_index() :: jax.process_count()]
    total = sum(shard.end - shard.first for shard in mine)
    with tqdm(total=total, unit=" records", disable=not is_main_process()) as bar:
        for shard in mine:
            entries: dict[int, Entry] = {}
            for numbers in _batches(setup, shard):
                begun = time.monotonic()
                for number, entry in zip(numbers, _entries(setup, shard, numbers), strict=True):
                    entries[int(shard.positions[number - shard.first])] = entry
                if not bar.n and is_main_process():
                    log_forecast_of([*entries.values()], time.monotonic() - begun, total, setup)
                bar.update(len(numbers))
            write_shard(folder, shard, entries, setup.settings.format)


def _batches(setup: Setup, shard: Shard) -> Iterator[list[int]]:
    """Yields the records of a shard, those of similar lengths together."""
    records = np.arange(shard.first, shard.end)
    order = np.argsort(-setup.sources[shard.source].lengths(records), kind="stable")
    for start in range(0, len(order), setup.rows):
        yield records[order[start : start + setup.rows]].tolist()


def _entries(setup: TransformersSetup, shard: Shard, numbers: Sequence[int]) -> list[Entry]:
    """Returns the entries of records, with the reason of those that cannot be read."""
    read: dict[int, ReadRecord] = {}
    reasons: dict[int, str] = {}
    for number in numbers:
        try:
            record = setup.sources[shard.source][number]
            images = [read_image(image, setup.images) for image in record.images]
            unique = setup.record_number(shard.source, number)
            read[number] = ReadRecord(unique, record, images)
        except UserError as error:
            reasons[number] = str(error)
    found = setup.teacher.entries([*read.values()], setup.settings.format)
    entries = dict(zip(read, found, strict=True))
    return [entries[n] if n in entries else Entry(None, reasons[n]) for n in numbers]
