"""Content of the rows of a run: that of its records if they are here, full rows if they are not."""

import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moddistill.config import TrainConfig
from moddistill.convert.resolve import RANDOM
from moddistill.data.pipeline import open_sources, plan_rows
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.models.flops import StepSize
from moddistill.models.vlm import ModelConfig
from moddistill.teachers.live import has_own_layout
from moddistill.training.program import SUPERVISED_SHARE, full_step_size, sides_of_stage
from moddistill.training.streams import row_spec, teacher_spec, with_steps

_ROWS = 4096  # whose mean stands for that of all rows


class Content(NamedTuple):
    """Mean content of a step.

    Attributes:
      size: of full rows if the records are not here.
      samples: None if the records are not here.
      padding: share of the positions, or None.
      steps: of the run; 0 if they follow from epochs of records that are not here.
    """

    size: StepSize
    samples: float | None
    padding: float | None
    steps: int


def step_content(
    config: TrainConfig, student: ModelConfig, teacher: ModelConfig | None = None
) -> Content:
    """Returns the mean content of a step, and makes the indices of its records that are missing.

    Both sides of a preference pair count as the longer one. The share of supervised tokens is
    assumed.

    Args:
      teacher: a live one.

    Raises:
      UserError: as `open_sources`.
    """
    tokenizer, data = _tokenizer(config), config.data
    files = [glob.glob(source.path, recursive=True) for source in data.sources.values()]
    if tokenizer is None or not files or not all(files):
        return Content(full_step_size(config, student, teacher), None, None, config.steps)
    sources, others = open_sources(data, row_spec(config, data, student.vision), tokenizer), ()
    if teacher is not None and has_own_layout(teacher, student):
        spec = teacher_spec(config, data, student, teacher)
        others = open_sources(data, spec, tokenizer, "config.teacher: config.data.sources")
    plan = plan_rows(data, sources, config.seed, others)
    steps = with_steps(config, plan).steps
    rows = [plan.row(number) for number in range(min(_ROWS, steps * config.batch_size))]
    samples = [sample for row in rows for sample in row]
    # A sample has place for the longer one of its two forms; the student reads its own.
    lengths = [sources[each.source].lengths(np.array([each.record])) for each in samples]
    lengths = np.concatenate(lengths).astype(np.float64)
    images = sum(sources[sample.source].images(sample.record) for sample in samples)
    per_step = config.batch_size / len(rows)
    sides = sides_of_stage(config)
    tokens = sides * per_step * lengths.sum()
    squares = sides * per_step * (lengths**2).sum()
    size = StepSize(tokens, squares, per_step * images, tokens * SUPERVISED_SHARE)
    padding = 1 - lengths.sum() / (len(rows) * data.max_length)
    return Content(size, per_step * len(samples), padding, steps)


def _tokenizer(config: TrainConfig) -> Tokenizer | None:
    """Returns the student's tokenizer if its folder is here."""
    folder = config.tokenizer if config.student.startswith(RANDOM) else config.student
    return load_tokenizer(folder) if folder and Path(folder).is_dir() else None
