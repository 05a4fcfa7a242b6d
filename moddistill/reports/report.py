"""The report of a recipe: one self-contained HTML page.

It shows a table of models, the training curves of each stage and, for each task, questions with
the answers of two models and the load of the experts.
"""

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from moddistill.errors import UserError
from moddistill.evals.task import Column
from moddistill.reports import template
from moddistill.reports.charts import load_card, stage_card
from moddistill.reports.table import html_table

MAX_IMAGE_SIZE = 256  # pixels of the longer side


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSection:
    """The part of the page about one task.

    Attributes:
      title: name of the task.
      note: explanation of its table columns.
      examples: `question`, `images` (files), `answers`, and `predictions`, a (text, is correct)
        pair for each model.
      loads: `layer`, and one number per expert for its `image` and its `text` tokens.
    """

    title: str
    note: str
    examples: Sequence[Mapping[str, Any]]
    loads: Sequence[Mapping[str, Any]]


def write_report(
    path: str | Path,
    *,
    title: str,
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
    columns: Sequence[Column],
    table: Sequence[Mapping[str, Any]],
    tasks: Sequence[TaskSection],
) -> None:
    """Writes the page.

    Args:
      path: the HTML file.
      title: heading of the page.
      stages: rows of `metrics.jsonl` (`step`, `loss`, named parts, `tokens_per_second`, `seconds`
        since the start) by the name of the stage.
      columns: the columns of the table.
      table: a row for each model with the keys of the columns.
      tasks: examples and expert loads of each task.

    Raises:
      UserError: if a row of the table has other keys than the columns, an image is missing, or a
        chart cannot be drawn (see `charts`).
    """
    page = template.PAGE.format(
        title=escape(title),
        style=template.STYLE,
        notes="".join(f"{escape(task.note)}\n" for task in tasks),
        table=html_table(columns, table),
        stages="".join(stage_card(name, rows) for name, rows in stages.items()),
        tasks="".join(map(_task_section, tasks)),
    )
    Path(path).write_text(page, encoding="utf-8")


def _task_section(task: TaskSection) -> str:
    title = escape(task.title)
    html = template.ANSWERS.format(title=title, examples="".join(map(_example, task.examples)))
    if task.loads:
        html += template.LOADS.format(title=title, loads="".join(map(load_card, task.loads)))
    return html


def _example(example: Mapping[str, Any]) -> str:
    return template.EXAMPLE.format(
        images="".join(
            template.IMAGE.format(data=_png_base64(Path(path))) for path in example["images"]
        ),
        question=escape(example["question"]),
        answers=escape(" / ".join(example["answers"])),
        predictions="".join(
            _prediction(model, *prediction) for model, prediction in example["predictions"].items()
        ),
    )


def _prediction(model: str, text: str, is_correct: bool) -> str:
    mark, kind = ("✓", "right") if is_correct else ("✗", "wrong")
    return template.PREDICTION.format(model=escape(model), kind=kind, mark=mark, text=escape(text))


def _png_base64(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: expected the image file of an example, got no such file")
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((MAX_IMAGE_SIZE, MAX_IMAGE_SIZE))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
