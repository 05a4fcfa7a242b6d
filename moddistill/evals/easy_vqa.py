"""easy-VQA: 9,673 official test questions about 1,000 images, scored by exact match.

    python -m moddistill.evaluate --model DIR --benchmark easy_vqa --data data/easy_vqa --out DIR

The data folder is the one that `python -m tools.easy_vqa` writes.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moddistill.errors import UserError

YES_NO = ("yes", "no")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question; `prompt` is the human turn as the model gets it, `<image>` included."""

    id: str
    image: Path
    prompt: str
    answer: str


def questions(data: Path) -> list[Question]:
    """The questions of `data`/test.json in their published order.

    A UserError if the file is missing or a record is no single question with one answer.
    """
    path = data / "test.json"
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: make it with python -m tools.easy_vqa --out {data}"
        )
    return [_question(record, path) for record in json.loads(path.read_text())]


def _question(record: dict[str, Any], path: Path) -> Question:
    turns = record["conversations"]
    roles = [turn["from"] for turn in turns]
    if roles != ["human", "gpt"]:
        raise UserError(f"{path}, record {record['id']}: roles {roles}, expected ['human', 'gpt']")
    prompt, answer = (turn["value"] for turn in turns)
    return Question(record["id"], path.parent / "images" / record["image"], prompt, answer)


def score(rows: Sequence[dict[str, Any]]) -> dict[str, float | int]:
    """Rates and counts of `rows` with `answer` and `prediction`.

    An answer is right if it equals the published one, case and surrounding space aside.
    `accuracy`, `accuracy_yes_no` (answer yes or no) and `accuracy_other` are shares of right
    answers, `false_yes_rate` is the share of "yes" among questions whose answer is "no".
    `questions` counts the rows, `unparsed` the yes/no questions answered with neither.
    A UserError if nothing counts towards a rate.
    """
    pairs = [(_normal(row["answer"]), _normal(row["prediction"])) for row in rows]
    yes_no = [pair for pair in pairs if pair[0] in YES_NO]
    return {
        "questions": len(pairs),
        "accuracy": _share([a == p for a, p in pairs], "accuracy"),
        "accuracy_yes_no": _share([a == p for a, p in yes_no], "accuracy_yes_no"),
        "accuracy_other": _share([a == p for a, p in pairs if a not in YES_NO], "accuracy_other"),
        "false_yes_rate": _share([p == "yes" for a, p in yes_no if a == "no"], "false_yes_rate"),
        "unparsed": sum(p not in YES_NO for _, p in yes_no),
    }


def _normal(text: str) -> str:
    return text.strip().lower()


def _share(hits: list[bool], name: str) -> float:
    if not hits:
        raise UserError(f"{name}: none of the rows counts towards it, expected at least one")
    return sum(hits) / len(hits)
