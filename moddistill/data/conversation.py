"""Renders conversations as pieces of text and control tokens, each marked as supervised or not.

Control tokens are pieces of their own, so that text is tokenised with control tokens switched off:
whatever a user writes stays text. Training and generation share one rendering; the prompt is a
prefix of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from moddistill.config import TEMPLATES
from moddistill.data.records import IMAGE
from moddistill.errors import UserError, nearest

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHATML_SYSTEM = "You are a helpful assistant."


class Piece(NamedTuple):
    """A text, or one control token (`special`); `supervised` pieces carry the loss."""

    text: str
    special: bool = False
    supervised: bool = False


def render(template: str, turns: Sequence[tuple[str, str]]) -> list[Piece]:
    """A whole conversation of (question, answer) turns; every answer and its end are supervised.

    `<image>` in a question becomes a control token where it stands. `plain` is the image, the
    answer and a line break; the question's words are dropped.

    Raises:
      UserError: the template is unknown, there is no turn, or `plain` has not exactly one turn
        with exactly one `<image>`.
    """
    _check_template(template)
    if not turns:
        raise UserError("a conversation has at least one turn")
    if template == "plain":
        return _render_plain(turns)
    pieces = _system(template)
    for question, answer in turns:
        pieces += _question(template, question, first=not pieces) + _answer(template, answer)
    return pieces


def prompt(template: str, turns: Sequence[tuple[str, str]], question: str) -> list[Piece]:
    """What generation is given: finished turns, then a question up to where its answer begins.

    Raises:
      UserError: as `render`; `plain` has no earlier turns.
    """
    _check_template(template)
    if template == "plain":
        return _render_plain([*turns, (question, "")])[:1]
    history = render(template, turns) if turns else _system(template)
    return history + _question(template, question, first=not history)


def end_token(template: str) -> str:
    """Where generation stops. For `plain` it is text, "\\n", which is tokenised apart."""
    _check_template(template)
    return {"vicuna": END_OF_TEXT, "chatml": IM_END, "plain": "\n"}[template]


def _check_template(template: str) -> None:
    if template not in TEMPLATES:
        accepted = ", ".join(TEMPLATES)
        hint = nearest(template, TEMPLATES)
        raise UserError(f"template {template!r} is unknown; accepted: {accepted}{hint}")


def _render_plain(turns: Sequence[tuple[str, str]]) -> list[Piece]:
    if len(turns) != 1:
        raise UserError(f"the plain template takes exactly one turn, not {len(turns)}")
    question, answer = turns[0]
    if question.count(IMAGE) != 1:
        raise UserError(f"the plain template takes one {IMAGE}, not {question.count(IMAGE)}")
    # Apart, since tokenizers merge it with the full stop before it, and nothing could end on that.
    end = Piece("\n", supervised=True)
    return [Piece(IMAGE, special=True), Piece(answer, supervised=True), end]


def _system(template: str) -> list[Piece]:
    if template == "vicuna":
        return []
    return [Piece(IM_START, special=True), Piece(f"system\n{CHATML_SYSTEM}"), *_im_end()]


def _question(template: str, question: str, *, first: bool) -> list[Piece]:
    if template == "vicuna":
        system = f"{VICUNA_SYSTEM} " if first else ""
        return _split(f"{system}USER: {question} ASSISTANT:")
    start = Piece(IM_START, special=True)
    return [start, *_split(f"user\n{question}"), *_im_end(), start, Piece("assistant\n")]


def _answer(template: str, answer: str) -> list[Piece]:
    if template == "vicuna":
        end = Piece(END_OF_TEXT, special=True, supervised=True)
        return [Piece(f" {answer}", supervised=True), end]
    return [Piece(answer, supervised=True), *_im_end(supervised=True)]


def _im_end(*, supervised: bool = False) -> list[Piece]:
    return [Piece(IM_END, special=True, supervised=supervised), Piece("\n")]


def _split(text: str) -> list[Piece]:
    """Text around `<image>`, which becomes a control token; empty text is left out."""
    pieces = []
    for number, part in enumerate(text.split(IMAGE)):
        if number:
            pieces.append(Piece(IMAGE, special=True))
        if part:
            pieces.append(Piece(part))
    return pieces
