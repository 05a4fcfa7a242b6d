"""An extraction by a teacher of `transformers`, one shard after the other."""

import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
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
from moddistill.data.pipeline import check_share
from moddistill.data.quarantine import Quarantine, Rejected
from moddistill.distributed.processes import is_main_process
from moddistill.errors import UserError, at_field
from moddistill.extraction.forecast import log_forecast_of
from moddistill.extraction.plan import Shard
from moddistill.extraction.setup import Setup, check_stage, entry_format, open_records
from moddistill.extraction.shards import write_shard
from moddistill.extraction.transformers_teacher import HowToRead, ReadRecord, TransformersTeacher
from moddistill.storage.digests import content_digest
from moddistill.teachers.cache import CacheSettings, TeacherIdentity, fingerprint_of
from moddistill.teachers.entries import Entry
from moddistill.training.architectures import student_of
from moddistill.training.streams import row_spec
from moddistill.training.validation import check_settings

LOG = logging.getLogger("moddistill")


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
        content_digest(source),
        hashlib.sha256(repr(texts).encode()).hexdigest(),
        "chat template of the teacher",
        {"processor": "of the teacher", **dataclasses.asdict(spec.images)},
        config.dtype,
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


def run(
    config: TrainConfig, setup: TransformersSetup, shards: Sequence[Shard], mesh: Any, folder: Path
) -> None:
    """Makes shards of a cache; processes take turns at them.

    Raises:
      UserError: the teacher cannot read more of the records than `data.max_rejected`.
    """
    del mesh
    mine = shards[jax.process_index() :: jax.process_count()]
    left_out = Quarantine(str(folder / "quarantine.jsonl"))
    total = sum(_work(setup, shard) for shard in mine)
    with tqdm(total=total, unit=" tokens", disable=not is_main_process()) as bar:
        for shard in mine:
            entries: dict[int, Entry] = {}
            for numbers in _batches(setup, shard):
                begun = time.monotonic()
                for number, entry in zip(numbers, _entries(setup, shard, numbers), strict=True):
                    entries[int(shard.positions[number - shard.first])] = entry
                work = _work(setup, shard, numbers)
                if not bar.n and is_main_process():
                    # Of these records and time, all have as many as of tokens.
                    share = sum(_work(setup, each) for each in shards) / work
                    seconds = (time.monotonic() - begun) / jax.process_count()
                    records = sum(each.end - each.first for each in shards)
                    log_forecast_of([*entries.values()], seconds, share, records, setup)
                bar.update(work)
            _list_left_out(config, setup, shard, entries, left_out)
            write_shard(folder, shard, entries, setup.settings.format)


def _work(setup: Setup, shard: Shard, numbers: Sequence[int] | None = None) -> int:
    """Returns the tokens of records, all of a shard by default, as the student reads them."""
    records = np.arange(shard.first, shard.end) if numbers is None else np.array(numbers)
    return int(setup.sources[shard.source].lengths(records).sum())


def _list_left_out(
    config: TrainConfig,
    setup: Setup,
    shard: Shard,
    entries: Mapping[int, Entry],
    left_out: Quarantine,
) -> None:
    """Lists records without targets; UserError if there are too many."""
    source = setup.sources[shard.source]
    numbers = dict(zip(shard.positions.tolist(), range(shard.first, shard.end), strict=True))
    found = [
        Rejected(*source.place(numbers[position]), entry.reason)
        for position, entry in entries.items()
        if entry.targets is None
    ]
    if found:
        left_out.add(found)
        count = sum(left_out.counts[path] for path in source.file_digests)
        check_share(source, count, config.data.max_rejected, left_out.path, found)


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
