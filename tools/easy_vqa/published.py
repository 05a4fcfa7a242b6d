"""The installed package easy-VQA, and captions deduced from its published answers.

Colours and shapes come from answers only, never from pixels.
"""

import collections
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from moddistill.errors import UserError

COLORS = ("black", "gray", "red", "blue", "green", "yellow", "brown", "teal")
SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")


class Question(NamedTuple):
    """One published question."""

    text: str
    answer: str
    image: int


def package_folder() -> Path:
    """Returns the folder `data` of the installed package; UserError if it is not installed."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError(
            "package easy_vqa: expected it installed (pip install easy-vqa==1.0), got none"
        )
    return Path(spec.origin).parent / "data"


def read_questions(published: Path, split: str) -> list[Question]:
    """Reads the questions of `split` ("train" or "test") in published order."""
    return [
        Question(*row) for row in json.loads((published / split / "questions.json").read_text())
    ]


def by_image(questions: Iterable[Question]) -> dict[int, list[Question]]:
    """Groups questions by image."""
    groups = collections.defaultdict(list)
    for question in questions:
        groups[question.image].append(question)
    return dict(groups)


def deduce(questions: Sequence[Question], values: Sequence[str]) -> str | None:
    """Deduces the colour or shape of an image from the answers about it.

    Args:
      values: all colours, or all shapes.

    Returns:
      The only value that is consistent with the answers; None if several are.

    Raises:
      UserError: the answers contradict each other.
    """
    possible = set(values)
    for text, answer, _ in questions:
        words = set(text.rstrip("?").split())
        if answer in values:
            possible &= {answer}
        elif answer in YES_NO:
            # "is no red shape present?" answered "no" affirms a red shape.
            affirmed = (answer == "yes") != bool(words & {"no", "not"})
            named = words & set(values)
            if named:
                possible = possible & named if affirmed else possible - named
        elif words & set(values):
            possible &= words
    if not possible:
        raise UserError(f"answers about train image {questions[0].image} contradict each other")
    return possible.pop() if len(possible) == 1 else None


def captions(groups: dict[int, list[Question]]) -> dict[int, tuple[str, str]]:
    """Returns colour and shape of every image whose answers determine both."""
    deduced = {image: (deduce(qs, COLORS), deduce(qs, SHAPES)) for image, qs in groups.items()}
    return {image: pair for image, pair in deduced.items() if None not in pair}


def caption(color: str, shape: str) -> str:
    """Returns the text of a caption."""
    return f"a {color} {shape}"
