"""Evaluation tasks: questions, the scores of predictions, and how tables show the scores."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# One line of predictions.jsonl: id, question, images, answers, prediction, correct.
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a task.

    Attributes:
      id: name of the question, unique within its task.
      prompt: the user's turn, with `<image>` once for every image.
      images: image files, in the order of their `<image>`.
      answers: the accepted answers, for scores and reports.
    """

    id: str
    prompt: str
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Column:
    """A table column: the key in each row, the title, and the format specification of values."""

    key: str
    title: str
    format: str = ".3f"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark as data: a module in `evals/`, or one of your own, defines it as `TASK`.

    Attributes:
      questions: reads the questions from the task's data folder.
      score: scores by name for all rows; a name without a column appears in scores.json only.
      is_correct: marks one row as right or wrong in the report.
      max_new_tokens: length at which an answer is truncated.
      columns: the scores that tables show, in this order.
      note: one sentence for the report that explains the columns.
    """

    questions: Callable[[Path], list[Question]]
    score: Callable[[Sequence[Row]], dict[str, float | int]]
    is_correct: Callable[[Row], bool]
    max_new_tokens: int
    columns: tuple[Column, ...]
    note: str = ""


def normalize(text: str) -> str:
    """Returns the text in lower case without surrounding space."""
    return text.strip().lower()


def exact_match(row: Row) -> bool:
    """Returns whether the prediction equals an accepted answer, ignoring case and outer space."""
    return normalize(row["prediction"]) in map(normalize, row["answers"])
