"""The batches of a run, from the records of its sources, and the lists of records left out."""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moddistill.config import DataConfig, TrainConfig
from moddistill.data.examples import ExampleSpec
from moddistill.data.images import PAD_COLOR, mean_color
from moddistill.data.pipeline import make_dataset
from moddistill.data.quarantine import Quarantine
from moddistill.distributed.processes import is_main_process
from moddistill.training.architectures import Models
from moddistill.training.stages import stage_of

LOG = logging.getLogger("moddistill")

# Files in which the pipeline lists records, and what happened to these.
_LISTS = {"quarantine.jsonl": "left out", "truncated.jsonl": "truncated to max_length"}


class Streams(NamedTuple):
    """Iterators over this process's share of each batch, as numpy arrays.

    Attributes:
      training: its position is saved in checkpoints.
      heldout: None for a run without held-out records.
    """

    training: Iterator[Any]
    heldout: Iterator[Any] | None


def open_streams(config: TrainConfig, models: Models, workdir: Path) -> Streams:
    """Opens all records of a run, so that unreadable ones are found before models are loaded.

    Raises:
      UserError: for sources that cannot be read.
    """
    make = functools.partial(_batches, config, models=models, workdir=workdir)
    training = make(config.data, origin="config.data.sources")
    if not config.heldout_steps:
        return Streams(training, None)
    heldout = dataclasses.replace(config.data, sources={"heldout": config.data.heldout})
    return Streams(training, make(heldout, origin="config.data"))


def _batches(
    config: TrainConfig,
    data: DataConfig,
    *,
    models: Models,
    workdir: Path,
    origin: str,
) -> Iterator[Any]:
    tower = models.student_config.vision
    spec = ExampleSpec(
        template=data.template,
        max_length=data.max_length,
        max_images=data.max_images,
        image_size=tower.image_size if tower else 0,
        image_tokens=tower.patches if tower else 0,
        pad_color=mean_color(tower.mean) if tower else PAD_COLOR,
    )
    dataset = make_dataset(
        data,
        spec,
        models.tokenizer,
        kind=stage_of(config).records,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        quarantine_path=str(workdir / "quarantine.jsonl"),
        origin=origin,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return iter(dataset)


def remove_lists(workdir: Path) -> None:
    """Removes lists of a run that left no checkpoint, whose records are read again."""
    if is_main_process():
        for name in _LISTS:
            (workdir / name).unlink(missing_ok=True)


def warn_of_records(workdir: Path) -> None:
    """Logs how many records were left out or truncated, and the file that lists them."""
    for name, what in _LISTS.items():
        listed = Quarantine(str(workdir / name))
        if listed.count:
            LOG.warning("%d records %s: %s", listed.count, what, listed.path)
