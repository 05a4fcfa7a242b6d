"""Summary of a recipe: the table of its models, their predictions, and the page of charts.

workdir/STAGE/evals/TASK/   predictions.jsonl and scores.json of one model on one task
workdir/predictions/TASK.jsonl   all models' predictions, one line per question
workdir/report.html
"""

from pathlib import Path
from typing import Any

from moddistill.config import RecipeConfig
from moddistill.evals.results import read_predictions, read_scores, write_jsonl
from moddistill.evals.runner import find_task
from moddistill.evals.task import Column, Row, Task
from moddistill.models.flops import parameter_counts
from moddistill.reports.report import TaskSection, write_report
from moddistill.storage.model_folder import read_model_config
from moddistill.training.metrics import read_metrics

EXAMPLES = 24  # questions of each task on the page


def evaluation_folder(workdir: Path, stage: str, task: str) -> Path:
    """Returns the folder of one model's results on one task."""
    return workdir / stage / "evals" / task


def table_columns(config: RecipeConfig) -> tuple[Column, ...]:
    """Returns the model, the columns of each task (prefixed if there are several), and sizes."""
    # Keys carry the task's name, since two tasks may have scores of one name.
    scores = [
        Column(
            f"{name}/{column.key}",
            column.title if len(config.tasks) == 1 else f"{name}: {column.title}",
            column.format,
        )
        for name, task in _tasks(config).items()
        for column in task.columns
    ]
    return (
        Column("model", "Model", ""),
        *scores,
        Column("parameters", "Parameters", ","),
        Column("activated", "Activated", ","),
        Column("seconds", "Seconds", ",.0f"),
    )


def table_rows(config: RecipeConfig, workdir: Path) -> list[dict[str, Any]]:
    """Returns a row for each evaluated model: scores, sizes and the seconds of its stage."""
    rows = []
    for stage in config.evaluated:
        row: dict[str, Any] = {"model": stage}
        for name, task in _tasks(config).items():
            scores = read_scores(evaluation_folder(workdir, stage, name))
            row |= {f"{name}/{column.key}": scores[column.key] for column in task.columns}
        total, activated = parameter_counts(read_model_config(workdir / stage / "model"))
        seconds = _training_metrics(workdir / stage)[-1]["seconds"]
        rows.append(row | {"parameters": total, "activated": activated, "seconds": seconds})
    return rows


def write_summary(config: RecipeConfig, workdir: Path) -> None:
    """Writes the predictions of each task and `report.html`."""
    sections = []
    for name, task in _tasks(config).items() if config.evaluated else ():
        rows = merged_predictions(config, workdir, name)
        path = workdir / "predictions" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path, rows)
        scores = read_scores(evaluation_folder(workdir, config.evaluated[-1], name))
        sections.append(
            TaskSection(
                title=name,
                note=task.note,
                examples=_examples(config, task, rows),
                loads=scores.get("expert_load", []),
            )
        )
    write_report(
        workdir / "report.html",
        title=f"{workdir.name}: {' → '.join(config.order)}",
        stages={stage: _training_metrics(workdir / stage) for stage in config.order},
        columns=table_columns(config),
        table=table_rows(config, workdir),
        tasks=sections,
    )


def merged_predictions(config: RecipeConfig, workdir: Path, task: str) -> list[Row]:
    """Returns a row for each question, with the prediction of each evaluated model by stage."""
    by_stage = {
        stage: read_predictions(evaluation_folder(workdir, stage, task))
        for stage in config.evaluated
    }
    merged = []
    for rows in zip(*by_stage.values(), strict=True):
        question = {key: rows[0][key] for key in ("id", "question", "images", "answers")}
        predictions = [row["prediction"] for row in rows]
        merged.append(question | {"predictions": dict(zip(by_stage, predictions, strict=True))})
    return merged


def _examples(config: RecipeConfig, task: Task, rows: list[Row]) -> list[dict[str, Any]]:
    """Questions at even distances, as the first and the last evaluated model answered them."""
    stages = dict.fromkeys((config.evaluated[0], config.evaluated[-1]))
    stride = max(1, len(rows) // EXAMPLES)
    examples = []
    for row in rows[::stride][:EXAMPLES]:
        texts = {stage: row["predictions"][stage] for stage in stages}
        marked = {
            stage: (text, task.is_correct(row | {"prediction": text}))
            for stage, text in texts.items()
        }
        examples.append(row | {"predictions": marked})
    return examples


def _tasks(config: RecipeConfig) -> dict[str, Task]:
    return {name: find_task(each.task) for name, each in config.tasks.items()}


def _training_metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl from training steps, without those of held-out records."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
