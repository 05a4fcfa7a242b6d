"""Suites of benchmarks: models side by side with published numbers, with bootstrap intervals.

`suites/NAME.json` lists the benchmarks of a suite (task of lmms-eval, metric, scale, how the metric
is computed from questions), those in its average, and the published models with their sources.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moddistill.errors import UserError, invalid, not_one_of
from moddistill.evals import bootstrap
from moddistill.evals.bootstrap import Units
from moddistill.evals.harness import run_tasks
from moddistill.evals.labels import labels
from moddistill.evals.question_scores import units_of
from moddistill.evals.results import SAMPLES, SCORES, is_evaluated, read_rows, read_scores
from moddistill.storage.json_file import parse, read_text

_FOLDER = Path(__file__).parent / "suites"
AVERAGE = "average"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A column of the paper's table.

    Attributes:
      name: as the paper has it.
      task, metric: of lmms-eval.
      units: the form of the metric's values for each question (`question_scores.FORMS`), or none.
      scale: factor from the metric to the paper's number.
      rows: a JSON list of the questions in the folder of results, if its units need more than what
        lmms-eval logs.
    """

    name: str
    task: str
    metric: str
    units: str
    scale: float | int
    lower_is_better: bool = False
    rows: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Benchmarks, the names of those in the average, and published models as in the file."""

    title: str
    source: str
    benchmarks: tuple[Benchmark, ...]
    average: tuple[str, ...]
    published: tuple[dict[str, Any], ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of lmms-eval, each once."""
        return tuple(dict.fromkeys(each.task for each in self.benchmarks))


def read_suite(name: str) -> Suite:
    """Returns a suite by its name.

    Raises:
      UserError: there is no such suite.
    """
    names = sorted(file.stem for file in _FOLDER.glob("*.json"))
    if name not in names:
        raise not_one_of("--suite", name, names)
    values = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Suite(
        title=values["title"],
        source=values["source"],
        benchmarks=tuple(Benchmark(**each) for each in values["benchmarks"]),
        average=tuple(values["average"]),
        published=tuple(values["published"]),
    )


def evaluate_models(
    suite: Suite, models: Sequence[str], out: Path, arguments: Mapping[str, str], include: str
) -> tuple[dict[str, Path], dict[str, dict[str, str]]]:
    """Evaluates models on the tasks of a suite, each into a folder of its own below `out`.

    A folder with `scores.json` is one of finished results, and is taken as it is. A model whose
    folder has scores of all tasks is not evaluated again.

    Returns:
      The folder of the results of each model by its label, and why tasks have none.

    Raises:
      UserError: as `run_tasks`.
    """
    folders, failures = {}, {}
    for label, model in zip(labels(models, "--compare"), models, strict=True):
        if is_evaluated(Path(model)):
            folders[label], failures[label] = Path(model), {}
        else:
            folders[label] = out / label
            failures[label] = run_tasks(model, suite.tasks, out / label, arguments, include)
    return folders, failures


def compare(
    suite: Suite, folders: Mapping[str, Path], failures: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Returns the comparison as JSON: rows of benchmarks and their average.

    A row has for each model `score`, `low`, `high` (of the interval), `questions`, and the
    `difference` from the first model with its interval; or a `note` on what is missing and why.
    """
    first = next(iter(folders))
    scores = {label: read_scores(f) if is_evaluated(f) else {} for label, f in folders.items()}
    rows, drawn = [], {}
    for benchmark in suite.benchmarks:
        cells, units = {}, {}
        for label, folder in folders.items():
            reason = failures.get(label, {}).get(benchmark.task)
            cells[label], found = _cell(benchmark, scores[label], folder, reason)
            if found is not None:
                units[label] = found
        drawn[benchmark.name] = _add_intervals(benchmark, cells, units, first)
        rows.append(_row(suite, dataclasses.asdict(benchmark), cells))
    rows.append(_row(suite, {"name": AVERAGE}, _averages(suite, rows, drawn, first)))
    return {
        "suite": suite.title,
        "source": suite.source,
        "models": {label: str(folder) for label, folder in folders.items()},
        "bootstrap": {
            "resamples": bootstrap.RESAMPLES,
            "confidence": bootstrap.CONFIDENCE,
            "seed": bootstrap.SEED,
        },
        "published": [
            {key: each[key] for key in ("model", "from", "source")} for each in suite.published
        ],
        "rows": rows,
    }


def _row(suite: Suite, benchmark: dict[str, Any], cells: dict[str, Any]) -> dict[str, Any]:
    published = {
        each["model"]: {
            "score": each["scores"][benchmark["name"]],
            "confirmed": benchmark["name"] not in each["unconfirmed"],
        }
        for each in suite.published
        if benchmark["name"] in each["scores"]
    }
    return benchmark | {"scores": cells, "published": published}


def _cell(
    benchmark: Benchmark, scores: Mapping[str, Any], folder: Path, reason: str | None
) -> tuple[dict[str, Any], Units | None]:
    """The score of a model on a benchmark, and its units if the questions are logged."""
    if benchmark.task not in scores:
        return {"note": reason or f"no scores of the task {benchmark.task!r}"}, None
    found = scores[benchmark.task]
    if not isinstance(found, dict):
        error = invalid(f"{SCORES}, {benchmark.task}", found, "scores by name")
        return {"note": str(error)}, None
    if benchmark.metric not in found:
        return {"note": f"no score {benchmark.metric!r} of the task {benchmark.task!r}"}, None
    score = found[benchmark.metric]
    if not isinstance(score, int | float) or not np.isfinite(score):
        error = invalid(f"{SCORES}, {benchmark.task}, {benchmark.metric}", score, "a number")
        return {"note": str(error)}, None
    cell: dict[str, Any] = {"score": score * benchmark.scale}
    try:
        ids, values, damaged = _questions(benchmark, folder)
    except UserError as error:
        return cell | {"note": f"no interval: {error}"}, None
    units = units_of(benchmark.units, ids, values)
    cell["questions"] = len(ids)
    if units is None:
        return cell | {"note": "no interval: the questions have no scores"}, None
    point = bootstrap.point(units)
    if not np.isclose(point, score, rtol=1e-6, atol=1e-9):
        lost = f"; {damaged} lines are damaged" if damaged else ""
        text = f"no interval: the questions give {point * benchmark.scale:.2f}{lost}"
        return cell | {"note": text}, None
    return cell, units


def _questions(benchmark: Benchmark, folder: Path) -> tuple[list[str], list[Any], int]:
    """The ids of questions, the metric's values of them, and the number of damaged lines.

    Raises:
      UserError: the file of the benchmark's rows is damaged.
    """
    if benchmark.rows and (folder / benchmark.rows).is_file():
        values = parse(read_text(folder / benchmark.rows), benchmark.rows)
        if not isinstance(values, list):
            raise invalid(benchmark.rows, values, "a list of questions")
        return [str(number) for number in range(len(values))], values, 0
    samples, damaged = read_rows(folder / SAMPLES / f"{benchmark.task}.jsonl")
    whole = [row for row in samples if "id" in row and isinstance(row.get("metrics"), dict)]
    damaged += len(samples) - len(whole)
    rows = [row for row in whole if benchmark.metric in row["metrics"]]
    values = [row["metrics"][benchmark.metric] for row in rows]
    return [str(row["id"]) for row in rows], values, damaged


def _add_intervals(
    benchmark: Benchmark, cells: dict[str, dict[str, Any]], units: dict[str, Units], first: str
) -> dict[str, np.ndarray]:
    """Adds intervals to the cells of a benchmark, and returns the replicates of each model."""
    drawn: dict[str, np.ndarray] = {}
    for label, found in units.items():
        paired = first in units and found.ids == units[first].ids
        values = bootstrap.replicates(found, benchmark.task) * benchmark.scale
        drawn[label] = values
        low, high = bootstrap.interval(values)
        cells[label] |= {"low": low, "high": high}
        if label != first and paired:
            _add_difference(cells[label], cells[first], values - drawn[first])
        elif label != first and first in units:
            cells[label]["note"] = f"no difference: other questions than {first}"
    return drawn


def _add_difference(cell: dict[str, Any], first: dict[str, Any], values: np.ndarray) -> None:
    low, high = bootstrap.interval(values)
    cell["difference"] = {"score": cell["score"] - first["score"], "low": low, "high": high}


def _averages(
    suite: Suite,
    rows: Sequence[dict[str, Any]],
    drawn: dict[str, dict[str, np.ndarray]],
    first: str,
) -> dict[str, dict[str, Any]]:
    """Means over the benchmarks of the average, which are independent of each other."""
    chosen = [row for row in rows if row["name"] in suite.average]
    cells: dict[str, dict[str, Any]] = {}
    replicates: dict[str, np.ndarray] = {}
    for label in rows[0]["scores"]:
        missing = [row["name"] for row in chosen if "score" not in row["scores"][label]]
        if missing:
            cells[label] = {"note": f"no average without {', '.join(missing)}"}
            continue
        cells[label] = {"score": float(np.mean([row["scores"][label]["score"] for row in chosen]))}
        values = [drawn[name].get(label) for name in suite.average]
        if any(each is None for each in values):
            cells[label]["note"] = "no interval: not all benchmarks have one"
            continue
        replicates[label] = np.mean(values, axis=0)
        low, high = bootstrap.interval(replicates[label])
        cells[label] |= {"low": low, "high": high}
        paired = all("difference" in row["scores"][label] for row in chosen)
        if label != first and paired:
            _add_difference(cells[label], cells[first], replicates[label] - replicates[first])
    return cells
