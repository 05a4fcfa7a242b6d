"""Summary of a recipe: the predictions of its models, the table of scores, and the report.

workdir/recipe.json               order of the stages, evaluated ones, modules of the tasks
workdir/STAGE/evals/TASK/         predictions.jsonl and scores.json of one model on one task
workdir/predictions/TASK.jsonl    all models' predictions, one line per question
workdir/report.html
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from moddistill.config import RecipeConfig
from moddistill.evals.results import write_jsonl
from moddistill.evals.task import Row
from moddistill.reports.report import write_report
from moddistill.reports.results_table import results_table
from moddistill.reports.table import format_table
from moddistill.reports.workdirs import RECIPE, Results, read_workdirs
from moddistill.storage.json_file import write_json

_QUESTION = ("id", "question", "images", "answers")
_LOG = logging.getLogger("moddistill")


def evaluation_folder(workdir: Path, stage: str, task: str) -> Path:
    """Returns the folder of one model's results on one task."""
    return workdir / stage / "evals" / task


def write_recipe(config: RecipeConfig, workdir: Path) -> None:
    """Records what reports need to know of a recipe besides the folders of its stages."""
    workdir.mkdir(parents=True, exist_ok=True)
    tasks = {name: each.task for name, each in config.tasks.items()}
    record = {"order": config.order, "evaluated": config.evaluated, "tasks": tasks}
    write_json(workdir / RECIPE, record)


def write_summary(workdir: Path) -> str:
    """Writes the predictions of each task and `report.html`; returns the table of scores.

    The table is empty if no model was evaluated.
    """
    content = read_workdirs([workdir])
    for name, found in content.tasks.items():
        path = workdir / "predictions" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path, merged_predictions(found))
    order = " → ".join(run.name for run in content.runs)
    write_report(workdir / "report.html", content, f"{workdir.name}: {order}")
    for problem in content.problems:
        _LOG.warning("report: %s", problem)
    return format_table(*results_table(content)) if content.models else ""


def merged_predictions(task: Sequence[Results]) -> list[Row]:
    """Returns a row for each question that all models answered, with their predictions."""
    by_model = {each.model: {row["id"]: row for row in each.rows} for each in task}
    [first, *_] = by_model.values()
    return [
        {key: row[key] for key in _QUESTION}
        | {"predictions": {model: rows[name]["prediction"] for model, rows in by_model.items()}}
        for name, row in first.items()
        if all(name in rows for rows in by_model.values())
    ]
