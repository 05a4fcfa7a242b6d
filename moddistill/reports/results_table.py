"""The table of models: their scores on all tasks, their sizes, and how long they trained."""

from typing import Any

from moddistill.evals.task import Column
from moddistill.reports.workdirs import Content, Results

_SIZES = (
    Column("parameters", "Parameters", ","),
    Column("activated", "Activated", ","),
    Column("seconds", "Seconds", ",.0f"),
)


def results_table(content: Content) -> tuple[list[Column], list[dict[str, Any]]]:
    """Returns the columns, and a row for each model with results, or for each run if none has.

    Scores of tasks of this library are those of their columns; of other tasks, all. Titles begin
    with the task if there are several. What is not known is None.
    """
    # Keys carry the task's name, since two tasks may have scores of one name.
    columns = [Column("model", "Model", "")]
    for task, found in content.tasks.items():
        for column in _score_columns(found[0]):
            title = column.title if len(content.tasks) == 1 else f"{task}: {column.title}"
            columns.append(Column(f"{task}/{column.key}", title, column.format))
    columns += _SIZES
    names = content.models or [run.name for run in content.runs]
    return columns, [_row(content, name, columns) for name in names]


def _score_columns(results: Results) -> tuple[Column, ...]:
    if results.definition is not None:
        return results.definition.columns
    return tuple(Column(name, name, ".4g") for name in results.scores)


def _row(content: Content, model: str, columns: list[Column]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(column.key for column in columns) | {"model": model}
    for results in content.results:
        if results.model == model:
            scores = {f"{results.task}/{name}": x for name, x in results.scores.items()}
            row |= {key: scores[key] for key in scores.keys() & row.keys()}
    for run in content.runs:
        if run.name == model:
            row["parameters"], row["activated"] = run.parameters or (None, None)
            seconds = [each["seconds"] for each in run.rows if "seconds" in each]
            row["seconds"] = seconds[-1] if seconds else None
    return row
