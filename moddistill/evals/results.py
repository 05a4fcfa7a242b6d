"""Files of one evaluation: `predictions.jsonl`, a row for each question, and `scores.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moddistill.evals.task import Row
from moddistill.storage import digests
from moddistill.storage.json_file import write_json

PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"


def check_results_folder(folder: Path) -> None:
    """Raises UserError in or below a model folder, whose digests list all its files."""
    digests.check_outside(folder / SCORES, "--out")


def is_evaluated(folder: Path) -> bool:
    """Returns whether the folder has scores, which are written last."""
    return (folder / SCORES).is_file()


def write_results(folder: Path, rows: Sequence[Row], scores: dict[str, Any]) -> None:
    """Writes both files, creating the folder."""
    # Scores come last: after an interruption the evaluation runs again.
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / PREDICTIONS, rows)
    write_json(folder / SCORES, scores)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_predictions(folder: Path) -> list[Row]:
    """Returns the rows of predictions.jsonl."""
    return [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]


def read_scores(folder: Path) -> dict[str, Any]:
    """Returns the object in scores.json."""
    return json.loads((folder / SCORES).read_text())
