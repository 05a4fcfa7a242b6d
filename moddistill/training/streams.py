"""The batches of a run, from the records of its sources, and the lists of records left out."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from moddistill.config import DataConfig, TrainConfig
from moddistill.data.image_decoding import ImageRules
from moddistill.data.images import PAD_COLOR, mean_color
from moddistill.data.packing import RowPlan
from moddistill.data.pipeline import (
    Batches,
    check_left_out,
    list_left_out,
    open_sources,
    plan_rows,
    warn_of_slow_files,
)
from moddistill.data.quarantine import Quarantine
from moddistill.data.rows import RowMaker, RowSpec, needed_image_slots
from moddistill.data.sources import Source
from moddistill.data.token_texts import texts_in_template
from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed.processes import barrier, is_main_process
from moddistill.distributed.sharding import local_rows
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig
from moddistill.teachers.cache import check_fingerprint, fingerprint_of
from moddistill.teachers.cached_rows import CachedRows
from moddistill.teachers.live import has_same_images
from moddistill.teachers.live_rows import LiveRows
from moddistill.training.architectures import Models
from moddistill.training.stages import stage_of

LOG = logging.getLogger("moddistill")

HELDOUT = "heldout"  # the name of the source of held-out records
# Files in which the pipeline lists records, and what happened to these.
LISTS = {
    "quarantine.jsonl": "left out",
    "truncated.jsonl": "truncated to max_length",
    "without_targets.jsonl": "without targets of the teacher",
}


class Streams(NamedTuple):
    """Iterators over this process's share of each batch, as numpy arrays.

    Attributes:
      training: its position is saved in checkpoints.
      heldout: None for a run without held-out records.
      plan: of the rows of `training`.
      digests: of the content of the files of both, by their paths.
    """

    training: Batches
    heldout: Batches | None
    plan: RowPlan
    digests: dict[str, str]


def open_streams(config: TrainConfig, models: Models, mesh: Mesh, workdir: Path) -> Streams:
    """Opens all sources of a run, so that unusable ones are found before models are loaded.

    Raises:
      UserError: for sources that cannot be read, or too many records that are left out.
    """
    data, origin = config.data, "config.data.sources"

    training = _open_stream(config, models, mesh, workdir, data, origin)
    streams = [training]
    if config.heldout_steps:
        data = dataclasses.replace(data, sources={HELDOUT: data.heldout})
        streams.append(_open_stream(config, models, mesh, workdir, data, "config.data"))
    digests: dict[str, str] = {}
    for stream in streams:
        for source in stream.sources:
            digests |= source.digests
    heldout = streams[1].batches if config.heldout_steps else None
    return Streams(training.batches, heldout, training.plan, digests)


class _Stream(NamedTuple):
    sources: list[Source]
    plan: RowPlan
    batches: Batches


def _open_stream(
    config: TrainConfig, models: Models, mesh: Mesh, workdir: Path, data: DataConfig, origin: str
) -> _Stream:
    """Opens the sources of `data`, which are those of training or of held-out records."""
    spec = row_spec(config, data, models.student_config.vision)
    sources = open_and_list(data, spec, models.tokenizer, workdir, origin)
    teacher, others = None, []
    if models.cache is not None:
        teacher = _cached_rows(config, models, sorted(data.sources), sources)
    elif models.has_own_layout:
        teacher = live_rows(config, models, data)
        of_teacher = f"config.teacher: {origin}"
        others = open_and_list(data, teacher.spec, teacher.tokenizer, workdir, of_teacher)
    plan = plan_rows(data, sources, config.seed, others)
    batches = Batches(
        RowMaker(
            plan,
            sources,
            models.tokenizer,
            spec,
            needed_image_slots(sources, data.packing),
            teacher,
        ),
        local_rows=local_rows(mesh, config.batch_size),
        batch_size=config.batch_size,
        workers=data.workers,
        timeout=data.worker_timeout,
        lists=workdir,
        max_rejected=data.max_rejected,
    )
    return _Stream(sources, plan, batches)


def live_rows(config: TrainConfig, models: Models, data: DataConfig) -> LiveRows:
    """Returns what rows have for a live teacher of another layout than the student's."""
    student, teacher = models.student_config, models.teacher_config
    spec = teacher_spec(config, data, student, teacher)
    tokenizer = models.teacher_tokenizer
    texts = texts_in_template(tokenizer, teacher.template)
    image_size = 0 if has_same_images(teacher, student) else spec.image_size
    return LiveRows(spec, tokenizer, texts, models.texts, image_size, _is_by_rank(config))


def teacher_spec(
    config: TrainConfig, data: DataConfig, student: ModelConfig, teacher: ModelConfig
) -> RowSpec:
    """Returns format and shapes of the rows as a live teacher of another layout reads them."""
    data = dataclasses.replace(data, template=teacher.template)
    return row_spec(config, data, teacher.vision if student.vision else None)


def with_steps(config: TrainConfig, plan: RowPlan) -> TrainConfig:
    """Returns the config with the number of steps that its epochs take."""
    if config.steps:
        return config
    rows = plan.rows_of(config.epochs)
    steps = math.ceil(rows / config.batch_size)
    LOG.info("%g epochs are %d rows, %d steps", config.epochs, rows, steps)
    return dataclasses.replace(config, steps=steps)


def row_spec(config: TrainConfig, data: DataConfig, tower: VisionConfig | None) -> RowSpec:
    """Returns format and shapes of the rows of a run.

    Args:
      tower: vision encoder of the model that reads the rows.
    """
    return RowSpec(
        kind=stage_of(config).records,
        template=data.template,
        max_length=data.max_length,
        image_size=tower.image_size if tower else 0,
        image_tokens=tower.patches if tower else 0,
        images=ImageRules(
            max_pixels=data.max_pixels,
            exif=data.exif,
            pad_color=mean_color(tower.mean) if tower else PAD_COLOR,
        ),
    )


def open_and_list(
    data: DataConfig, spec: RowSpec, tokenizer: Tokenizer, folder: Path, origin: str
) -> list[Source]:
    """Opens sources, of which the main process makes the missing indices.

    Records that are left out or truncated are listed in `folder`.

    Raises:
      UserError: for sources that cannot be read, or too many records that are left out.
    """
    sources = _open(data, spec, tokenizer, origin)
    if is_main_process():
        list_left_out(sources, folder)
        warn_of_slow_files(sources)
    barrier(f"listing {origin}")
    for source in sources:
        check_left_out(source, data.max_rejected, folder / "quarantine.jsonl")
    return sources


def _open(data: DataConfig, spec: RowSpec, tokenizer: Tokenizer, origin: str) -> list[Source]:
    """Opens sources, of which the main process makes the missing indices."""
    sources = open_sources(data, spec, tokenizer, origin) if is_main_process() else []
    barrier(f"indexing {origin}")
    return sources or open_sources(data, spec, tokenizer, origin)


def _cached_rows(
    config: TrainConfig, models: Models, names: Sequence[str], sources: Sequence[Source]
) -> CachedRows:
    """Returns the targets of sources; UserError for a cache of other records."""
    run = fingerprint_of(config, stage_of(config).records, dict(zip(names, sources, strict=True)))
    check_fingerprint(models.cache, run, "config.teacher")
    return CachedRows(models.cache, tuple(names), models.ids, models.texts, _is_by_rank(config))


def _is_by_rank(config: TrainConfig) -> bool:
    """Returns whether the divergence does not compare probabilities of equal ids."""
    return config.distillation.divergence == "uld"


def remove_lists(workdir: Path) -> None:
    """Removes lists of a run that left no checkpoint, whose records are read again."""
    if is_main_process():
        for name in LISTS:
            (workdir / name).unlink(missing_ok=True)


def warn_of_records(workdir: Path) -> None:
    """Logs how many records were left out or truncated, and the file that lists them."""
    for name, what in LISTS.items():
        listed = Quarantine(str(workdir / name))
        if listed.count:
            LOG.warning("%d records %s: %s", listed.count, what, listed.path)
