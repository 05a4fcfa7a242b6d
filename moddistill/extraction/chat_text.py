"""Conversations as text in a published chat template, and where their answers are in it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moddistill.data.records import IMAGE, AnyRecord, PreferencePair
from moddistill.errors import UserError

Message = dict[str, Any]
# Characters that are in no text, around the number of an answer.
_MARK = "\ue0f0{}\ue0f1"


class ChatText(NamedTuple):
    """A conversation in a template.

    Attributes:
      answers: first character of each supervised answer, and the one after its last.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


def chat_texts(record: AnyRecord, template: Callable[[list[Message]], str]) -> list[ChatText]:
    """Returns the text of a conversation, or of both sides of a pair, whose last answer counts.

    Args:
      template: from messages to their text, with placeholders of images.

    Raises:
      UserError: the template does not contain the answers as they are.
    """
    if not isinstance(record, PreferencePair):
        return [_chat_text(record.system, record.turns, template)]
    sides = []
    for answer in (record.chosen, record.rejected):
        turns = (*record.history, (record.question, answer))
        found = _chat_text(record.system, turns, template)
        sides.append(found._replace(answers=found.answers[-1:]))
    return sides


def after_answer(template: Callable[[list[Message]], str]) -> str:
    """Returns what a template has after the last answer."""
    mark = _MARK.format(0)
    return template(messages(None, [("?", mark)])).partition(mark)[2]


def messages(system: str | None, turns: Sequence[tuple[str, str]]) -> list[Message]:
    """Returns turns as the messages of a processor, with `<image>` as an image."""
    found = [_message("system", system)] if system else []
    for question, answer in turns:
        found += [_message("user", question), _message("assistant", answer)]
    return found


def _message(role: str, text: str) -> Message:
    """Returns a message; line breaks next to an image, as LLaVA's data has, are the template's."""
    parts: list[dict[str, str]] = []
    texts = text.split(IMAGE) if role == "user" else [text]
    for number, part in enumerate(texts):
        if number:
            parts.append({"type": "image"})
            part = part.removeprefix("\n")
        if number < len(texts) - 1:
            part = part.removesuffix("\n")
        if part:
            parts.append({"type": "text", "text": part})
    return {"role": role, "content": parts}


def _chat_text(
    system: str | None, turns: Sequence[tuple[str, str]], template: Callable[[list[Message]], str]
) -> ChatText:
    """Finds the answers by marks in their place: they may occur elsewhere in the text, too."""
    marks = [_MARK.format(number) for number in range(len(turns))]
    marked = [(question, mark) for (question, _), mark in zip(turns, marks, strict=True)]
    rest, text, answers = template(messages(system, marked)), "", []
    for mark, (_, answer) in zip(marks, turns, strict=True):
        before, found, rest = rest.partition(mark)
        text += before
        if not found:
            raise UserError(f"chat template: expected {len(turns)} answers, got {len(answers)}")
        answers.append((len(text), len(text) + len(answer)))
        text += answer
    text += rest
    if template(messages(system, turns)) != text:
        raise UserError("chat template: expected answers as they are, got changed ones")
    return ChatText(text, tuple(answers))
