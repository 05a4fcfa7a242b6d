"""Checked records: conversations and preference pairs, whatever form they were published in."""

import dataclasses
from collections.abc import Sequence

from moddistill.data.image_files import EmbeddedImage, ImageFile
from moddistill.errors import UserError, invalid

IMAGE = "<image>"
ImageRef = ImageFile | EmbeddedImage
Turns = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One conversation: `turns` are (question, answer) pairs, with `<image>` in the questions.

    Attributes:
      file: path of the file that contains the record.
      line: its number in the file, from 1: a line of JSONL, an element of JSON, a row of parquet.
      system: system prompt; None for that of the template.
    """

    file: str
    line: int
    id: str
    images: tuple[ImageRef, ...]
    turns: Turns
    system: str | None = None

    def __post_init__(self):
        _check_texts(self.system, self.turns)
        _check_image_count([question for question, _ in self.turns], self.images)


@dataclasses.dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one question, which may follow earlier turns (`history`)."""

    file: str
    line: int
    id: str
    images: tuple[ImageRef, ...]
    history: Turns
    question: str
    chosen: str
    rejected: str
    system: str | None = None

    def __post_init__(self):
        answers = ((self.question, self.chosen), (self.question, self.rejected))
        _check_texts(self.system, self.history + answers)
        _check_image_count([question for question, _ in self.history + answers[:1]], self.images)
        if self.chosen == self.rejected:
            raise invalid("rejected", self.rejected, "another text than chosen")


AnyRecord = Record | PreferencePair


def _check_texts(system: str | None, turns: Turns) -> None:
    for text in (system or "", *(text for turn in turns for text in turn)):
        check_unicode(text)
    if IMAGE in (system or ""):
        raise invalid("system", system, f"no {IMAGE}, which only questions contain")
    for _, answer in turns:
        if not answer.strip():
            raise invalid("answer", answer, "a text that is not blank")
        if IMAGE in answer:
            raise invalid("answer", answer, f"no {IMAGE}, which only questions contain")


def check_unicode(text: str) -> None:
    """Raises UserError for a lone surrogate, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text: expected valid Unicode, got {error}") from None


def _check_image_count(questions: Sequence[str], images: tuple[ImageRef, ...]) -> None:
    """Raises UserError unless the questions contain `<image>` once for each image."""
    placeholders = sum(question.count(IMAGE) for question in questions)
    if placeholders != len(images):
        raise invalid(f"number of {IMAGE}", placeholders, f"{len(images)}, one per image")
