"""Files of one evaluation, in a folder of its own.

`evaluation.json`: the model, and how it was run. `scores.json`: written last.
`predictions.jsonl`: a row for each question of a task of this library; for tasks of lmms-eval,
`samples/TASK.jsonl`, with the values of the task's metrics for each question.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moddistill.errors import UserError
from moddistill.evals.task import Row
from moddistill.storage import digests
from moddistill.storage.json_file import read_json, write_json

PREDICTIONS, SCORES, SAMPLES = "predictions.jsonl", "scores.json", "samples"
EVALUATION, ANSWERS = "evaluation.json", "answers.jsonl"
_LARGEST_SCORES = 256 * 2**20  # bytes


def check_results_folder(folder: Path) -> None:
    """Raises UserError in or below a model folder, whose digests list all its files."""
    digests.check_outside(folder / SCORES, "--out")


def is_evaluated(folder: Path) -> bool:
    """Returns whether the folder has scores, which are written last."""
    return (folder / SCORES).is_file()


def write_results(folder: Path, rows: Sequence[Row], scores: dict[str, Any]) -> None:
    """Writes predictions and scores, creating the folder."""
    # Scores come last: after an interruption the evaluation runs again.
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / PREDICTIONS, rows)
    write_json(folder / SCORES, scores)


def write_jsonl(path: Path, rows: Sequence[Row]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_scores(folder: Path) -> dict[str, Any]:
    """Returns the object in scores.json.

    Raises:
      UserError: it is missing or damaged.
    """
    return read_json(folder / SCORES, _LARGEST_SCORES)


def read_rows(path: Path) -> tuple[list[Row], int]:
    """Returns the JSON objects in the lines of a file, and the number of lines that are none.

    An interruption leaves a last line that is none. A file that does not exist has no lines.
    """
    if not path.is_file():
        return [], 0
    rows, damaged = [], 0
    # Not `splitlines`, for which characters inside of answers end a line too.
    for line in path.read_text(errors="replace").split("\n"):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def check_same_model(folder: Path, evaluation: dict[str, Any]) -> None:
    """Records what is evaluated into a folder, or compares it with what was recorded before.

    Raises:
      UserError: the folder has results of another model, or of another way to run it.
    """
    file = folder / EVALUATION
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, evaluation)
        return
    recorded = read_json(file)
    for name, value in evaluation.items():
        if recorded.get(name) != value:
            raise UserError(
                f"{folder}: expected results of {name} {value!r}, got those of "
                f"{recorded.get(name)!r}; choose another --out"
            )
