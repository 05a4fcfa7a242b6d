"""Runs and results in folders: what reports are made of.

A folder with `metrics.jsonl` is a run, one with `scores.json` has results. Both are looked for in
the given folders and below, so that the workdir of a recipe, of one training run, and folders of
`moddistill.evaluate` all serve. Damage is listed, and the rest is read.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moddistill.errors import UserError, invalid
from moddistill.evals.labels import labels
from moddistill.evals.results import (
    EVALUATION,
    PREDICTIONS,
    SAMPLES,
    SCORES,
    read_rows,
    read_scores,
)
from moddistill.evals.runner import find_task
from moddistill.evals.samples import score_of
from moddistill.evals.task import Row, Task
from moddistill.models.flops import parameter_counts
from moddistill.storage.json_file import read_json
from moddistill.storage.model_folder import read_model_config
from moddistill.training.metrics import read_metrics

RECIPE = "recipe.json"  # in the workdir of a recipe: the order of its stages, its tasks
_CONFIG, _METRICS = "config.json", "metrics.jsonl"
# Folders that hold neither runs nor results, but many files.
_PASSED_OVER = {"checkpoints", "tensorboard", "model", "predictions", SAMPLES, "evaluations"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: its rows of metrics, its parameters (all, activated) and its teacher."""

    name: str
    rows: Sequence[Mapping[str, Any]]
    parameters: tuple[int, int] | None = None
    teacher: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Results of a model on a task.

    Attributes:
      model, task: their names.
      scores: numbers by name.
      loads: of experts, as in `scores.json`; empty for dense models.
      rows: questions with answers and predictions.
      definition: the task, if it is one of this library.
      images: the folder that the files in `images` of a row are in.
    """

    model: str
    task: str
    scores: Mapping[str, float | int]
    loads: Sequence[Mapping[str, Any]]
    rows: Sequence[Row]
    definition: Task | None
    images: Path

    def score(self, row: Row) -> float | None:
        """Returns the score of a question from 0 to 1; None if it has none."""
        if "correct" in row:
            return float(row["correct"])
        if self.definition is not None:
            return float(self.definition.is_correct(row))
        return score_of(row.get("metrics", {}))


@dataclasses.dataclass(kw_only=True)
class Content:
    """What was found, in the order in which it was trained, and what could not be read."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    results: list[Results] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def models(self) -> list[str]:
        """Names of the models with results."""
        return list(dict.fromkeys(each.model for each in self.results))

    @property
    def tasks(self) -> dict[str, list[Results]]:
        """Results by task."""
        found: dict[str, list[Results]] = {}
        for each in self.results:
            found.setdefault(each.task, []).append(each)
        return found


def read_workdirs(folders: Sequence[Path]) -> Content:
    """Reads all runs and results in and below folders.

    Names are those of folders below a given one; with several given ones, they begin with its name.

    Raises:
      UserError: no folder has a run or results.
    """
    content = Content()
    names = labels([str(folder.resolve()) for folder in folders], "DIR")
    for folder, name in zip(folders, names, strict=True):
        _read_folder(content, folder, f"{name}/" if len(folders) > 1 else "")
    if not content.runs and not content.results:
        raise UserError("; ".join(content.problems))
    return content


def _read_folder(content: Content, folder: Path, prefix: str) -> None:
    if not folder.is_dir():
        content.problems.append(f"{folder}: expected a folder, got none")
        return
    recipe: Mapping[str, Any] = {}
    if (folder / RECIPE).is_file():
        with _listed(content, folder):
            recipe = read_json(folder / RECIPE)
    runs, results = (_ordered(_find(folder, name), recipe) for name in (_METRICS, SCORES))
    for run in runs:
        with _listed(content, run):
            _add_run(content, run, folder, prefix)
    for found in results:
        with _listed(content, found):
            _add_results(content, found, folder, prefix, recipe)
    if not runs and not results:
        content.problems.append(
            f"{folder}: expected a workdir or a folder of results, got neither {_METRICS} nor "
            f"{SCORES} in it or below"
        )


@contextlib.contextmanager
def _listed(content: Content, folder: Path) -> Iterator[None]:
    """Makes an error of what is in a folder one of the problems."""
    try:
        yield
    except UserError as error:
        text = str(error)
        content.problems.append(text if str(folder) in text else f"{folder}: {text}")


def _find(folder: Path, name: str) -> Iterator[Path]:
    for found, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if each not in _PASSED_OVER)
        if name in files:
            yield Path(found)


def _ordered(folders: Iterator[Path], recipe: Mapping[str, Any]) -> list[Path]:
    """Folders in the order of the recipe's stages, or else in that in which they were begun."""
    order, tasks = (list(recipe.get(name, ())) for name in ("order", "tasks"))

    def key(folder: Path) -> tuple[int, float, int, str]:
        stage = next((part for part in folder.parts[::-1] if part in order), None)
        run = next((each for each in (folder, *folder.parents) if (each / _CONFIG).is_file()), None)
        began = (run / _CONFIG).stat().st_mtime if run else 0.0
        task = tasks.index(folder.name) if folder.name in tasks else len(tasks)
        return (order.index(stage) if stage else len(order), began, task, str(folder))

    return sorted(folders, key=key)


def _name(folder: Path, root: Path, prefix: str) -> str:
    inner = folder.relative_to(root).as_posix()
    return prefix + inner if inner != "." else prefix.rstrip("/") or folder.resolve().name


def _add_run(content: Content, folder: Path, root: Path, prefix: str) -> None:
    rows = read_metrics(folder / _METRICS)
    if not any("loss" in row for row in rows):
        raise UserError(f"{folder / _METRICS}: expected rows of training steps, got none")
    parameters, teacher = None, ""
    if (folder / "model").is_dir():
        with _listed(content, folder):
            parameters = parameter_counts(read_model_config(folder / "model"))
    if (folder / _CONFIG).is_file():
        with _listed(content, folder):
            teacher = str(read_json(folder / _CONFIG).get("teacher", ""))
    name = _name(folder, root, prefix)
    content.runs.append(Run(name=name, rows=rows, parameters=parameters, teacher=teacher))


def _add_results(
    content: Content, folder: Path, root: Path, prefix: str, recipe: Mapping[str, Any]
) -> None:
    """Adds the results of the one task, or of the tasks of lmms-eval, in a folder."""
    scores = read_scores(folder)
    of_stage = folder.parent.name == "evals"  # STAGE/evals/TASK
    name = _name(folder.parents[1] if of_stage else folder, root, prefix)
    if not (folder / PREDICTIONS).is_file() and all(isinstance(x, dict) for x in scores.values()):
        for task, values in scores.items():
            file = folder / SAMPLES / f"{task}.jsonl"
            if not values and not file.is_file():  # a group of tasks, which have scores
                continue
            rows = _rows(content, file)
            found = _results(content, name, task, values, rows, None, folder / SAMPLES)
            content.results.append(found)
        return
    recorded = read_json(folder / EVALUATION) if (folder / EVALUATION).is_file() else {}
    task = folder.name if of_stage else str(recorded.get("task", folder.name))
    definition = _definition(recipe.get("tasks", {}).get(task, recorded.get("task", task)))
    rows = _rows(content, folder / PREDICTIONS)
    content.results.append(_results(content, name, task, scores, rows, definition, Path()))


def _definition(name: str) -> Task | None:
    """The task of that name or module; None if it cannot be found any more."""
    try:
        return find_task(name)
    except UserError:
        return None


def _rows(content: Content, path: Path) -> list[Row]:
    rows, damaged = read_rows(path)
    whole = [row for row in rows if _is_whole(row)]
    damaged += len(rows) - len(whole)
    if damaged:
        lines = "1 line that is" if damaged == 1 else f"{damaged} lines that are"
        content.problems.append(
            f"{path}: left out {lines} no question with its answer, of {len(whole) + damaged}"
        )
    if not whole:
        content.problems.append(f"{path}: expected questions with their answers, got none")
    return whole


def _is_whole(row: Row) -> bool:
    """Whether a row has an answer, and what `Results.score` reads."""
    return (
        {"id", "prediction"} <= row.keys()
        and not {"correct", "metrics", "answers"}.isdisjoint(row)
        and isinstance(row.get("correct", False), int | float)
        and isinstance(row.get("metrics", {}), dict)
        and isinstance(row.get("answers", []), list)
        and isinstance(row.get("images", []), list)
        and all(isinstance(name, str) for name in row.get("images", []))
    )


def _is_load(load: Any) -> bool:
    """Whether this is the load of a layer: numbers of one length for both modalities."""
    if not isinstance(load, dict) or not {"layer", "image", "text"} <= load.keys():
        return False
    values = [load[kind] for kind in ("image", "text")]
    if not all(isinstance(each, list) for each in values) or len({*map(len, values)}) > 1:
        return False
    numbers = [*values[0], *values[1]]
    return all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in numbers) and any(
        numbers
    )


def _results(
    content: Content,
    model: str,
    task: str,
    scores: Mapping[str, Any],
    rows: Sequence[Row],
    definition: Task | None,
    images: Path,
) -> Results:
    numbers = {
        key: value
        for key, value in scores.items()
        if isinstance(value, int | float) and "_stderr" not in key and key != "expert_load"
    }
    loads = scores.get("expert_load", [])
    if not isinstance(loads, list) or not all(map(_is_load, loads)):
        expected = "for each layer a number >= 0 of image and of text tokens for each expert"
        content.problems.append(str(invalid(f"{model}, {task}: expert_load", loads, expected)))
        loads = []
    return Results(
        model=model,
        task=task,
        scores=numbers,
        loads=loads,
        rows=rows,
        definition=definition,
        images=images,
    )
