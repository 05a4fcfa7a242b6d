"""easy-VQA: 9,673 official test questions about 1,000 images, scored by exact match.

    python -m moddistill.evaluate --model DIR --task easy_vqa --data data/easy_vqa --out DIR

`python -m tools.easy_vqa` writes the data folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moddistill.data.image_files import ImageFile, confined_path
from moddistill.errors import UserError, invalid, one_line
from moddistill.evals.task import Column, Question, Row, Task, exact_match, normalize
from moddistill.storage.json_file import parse, read_text

YES_NO = ("yes", "no")
_LARGEST_FILE = 64 * 2**20  # bytes; the published questions have 3 MB


def questions(data: Path) -> list[Question]:
    """Returns the questions of `data`/test.json in their published order.

    Raises:
      UserError: if the file is missing, larger than 64 MiB or no JSON list, or a record is not one
        question with one answer about an image in `data`/images.
    """
    path = data / "test.json"
    if not path.is_file():
        raise UserError(
            f"{path}: expected a file of `python -m tools.easy_vqa --out {data}`, got none"
        )
    records = parse(read_text(path, _LARGEST_FILE), str(path))
    if not isinstance(records, list):
        raise invalid(str(path), records, "a list of records")
    return [_question(record, path) for record in records]


def _question(record: Any, path: Path) -> Question:
    match record:
        case {"id": str(name), "image": str(image), "conversations": [*turns]}:
            origin = f"{path}, record {one_line(name)}"
        case _:
            expected = "an object with id, image and conversations"
            raise invalid(f"{path}: record", record, expected)
    roles = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    if roles != ["human", "gpt"]:
        raise invalid(origin, roles, "roles ['human', 'gpt']")
    prompt, answer = (turn.get("value") for turn in turns)
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise invalid(origin, [prompt, answer], "two texts")
    images = path.parent / "images"
    confined_path(ImageFile(str(images), image))
    return Question(id=name, prompt=prompt, images=(str(images / image),), answers=(answer,))


def score(rows: Sequence[Row]) -> dict[str, float | int]:
    """Returns rates and counts over rows with one answer each.

    `accuracy`, `accuracy_yes_no` (answer yes or no) and `accuracy_other` are shares of exact
    matches; `false_yes_rate` is the share of "yes" among questions whose answer is "no".
    `questions` counts the rows, `unparsed` the yes/no questions answered with neither.

    Raises:
      UserError: if a rate has no rows.
    """
    # A model that always answers "yes" gets half of the yes/no questions right, and has a false-yes
    # rate of 1; hence the separate rates.
    correct = [exact_match(row) for row in rows]
    pairs = [(normalize(row["answers"][0]), normalize(row["prediction"])) for row in rows]
    yes_no = [pair for pair in pairs if pair[0] in YES_NO]
    return {
        "questions": len(pairs),
        "accuracy": _share(correct, "accuracy"),
        "accuracy_yes_no": _share([a == p for a, p in yes_no], "accuracy_yes_no"),
        "accuracy_other": _share([a == p for a, p in pairs if a not in YES_NO], "accuracy_other"),
        "false_yes_rate": _share([p == "yes" for a, p in yes_no if a == "no"], "false_yes_rate"),
        "unparsed": sum(p not in YES_NO for _, p in yes_no),
    }


def _share(hits: list[bool], name: str) -> float:
    if not hits:
        raise UserError(f"{name}: expected at least one question of this kind, got none")
    return sum(hits) / len(hits)


TASK = Task(
    questions=questions,
    score=score,
    is_correct=exact_match,
    max_new_tokens=16,
    columns=(
        Column("accuracy", "Accuracy"),
        Column("accuracy_yes_no", "Yes/no"),
        Column("accuracy_other", "Other"),
        Column("false_yes_rate", "False yes"),
    ),
    note="Shares of questions: answered as published, and answered “yes” where “no” is true.",
)
