"""The installed package easy-VQA, and what its published answers say about each image.

Colours and shapes come from the answers alone, never from pixels.
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
    """The folder `data` of the installed package; a UserError if it is not installed."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("the package easy_vqa is not installed: pip install easy-vqa==1.0")
    return Path(spec.origin).parent / "data"


def read_questions(published: Path, split: str) -> list[Question]:
    """The questions of `split` ("train" or "test") in their published order."""
    return [
        Question(*row) for row in json.loads((published / split / "questions.json").read_text())
    ]


def by_image(questions: Iterable[Question]) -> dict[int, list[Question]]:
    """The questions of each image."""
    groups = collections.defaultdict(list)
    for question in questions:
        groups[question.image].append(question)
    return dict(groups)


def deduce(questions: Sequence[Question], values: Sequence[str]) -> str | None:
    """The one of `values` (all colours, or all shapes) that the answers leave possible.

    None if several remain; a UserError if the answers contradict each other.
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
    """Colour and shape of every image whose answers determine both."""
    found = {image: (deduce(qs, COLORS), deduce(qs, SHAPES)) for image, qs in groups.items()}
    return {image: pair for image, pair in found.items() if None not in pair}


def caption(color: str, shape: str) -> str:
    """The text of a caption."""
    return f"a {color} {shape}"
