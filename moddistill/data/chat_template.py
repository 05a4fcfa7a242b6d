"""Chat templates: conversations to pieces of text and control tokens, with supervision flags.

Control tokens are pieces of their own, and text is tokenised with control tokens switched off, so
users cannot forge a turn. Training and generation share one rendering: a prompt is a prefix of the
training sample.
"""

from collections.abc import Sequence
from typing import NamedTuple

from moddistill.config import TEMPLATES
from moddistill.data.records import IMAGE
from moddistill.errors import UserError, invalid, not_one_of

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHATML_SYSTEM = "You are a helpful assistant."


class Piece(NamedTuple):
    """A text, or one control token (`special`); `supervised` pieces count in the loss."""

    text: str
    special: bool = False
    supervised: bool = False


def render(
    template: str, turns: Sequence[tuple[str, str]], system: str | None = None
) -> list[Piece]:
    """Renders a conversation of (question, answer) turns; answers and their ends are supervised.

    Each `<image>` in a question becomes a control token in place. `plain` is the image, the answer
    and a line break; the system prompt and the text of the question are dropped.

    Args:
      system: system prompt in place of the template's.

    Raises:
      UserError: the template is unknown, there is no turn, or `plain` has not exactly one turn
        with exactly one `<image>`.
    """
    _check_template(template)
    if not turns:
        raise UserError("conversation: expected at least one turn, got none")
    if template == "plain":
        return _render_plain(turns)
    pieces = _system(template, system)
    for question, answer in turns:
        opening = None if pieces else system or VICUNA_SYSTEM
        pieces += _question(template, question, opening) + _answer(template, answer)
    return pieces


def prompt(
    template: str,
    turns: Sequence[tuple[str, str]],
    question: str,
    system: str | None = None,
) -> list[Piece]:
    """Renders a generation prompt: finished turns and a question, up to the start of its answer.

    Raises:
      UserError: as `render`; `plain` has no earlier turns.
    """
    _check_template(template)
    if template == "plain":
        return _render_plain([*turns, (question, "")])[:1]
    history = render(template, turns, system) if turns else _system(template, system)
    return history + _question(template, question, None if history else system or VICUNA_SYSTEM)


def end_token(template: str) -> str:
    """Returns the token at which generation stops; for `plain` the text "\\n", no control token."""
    _check_template(template)
    return {"vicuna": END_OF_TEXT, "chatml": IM_END, "plain": "\n"}[template]


def _check_template(template: str) -> None:
    if template not in TEMPLATES:
        raise not_one_of("template", template, TEMPLATES)


def _render_plain(turns: Sequence[tuple[str, str]]) -> list[Piece]:
    if len(turns) != 1:
        raise invalid("turns of the plain template", len(turns), "exactly 1")
    question, answer = turns[0]
    if question.count(IMAGE) != 1:
        raise invalid(f"number of {IMAGE} in the plain template", question.count(IMAGE), "1")
    # A piece of its own: BPE would merge ".\n" into one token, and generation could not stop at it.
    end = Piece("\n", supervised=True)
    return [Piece(IMAGE, special=True), Piece(answer, supervised=True), end]


def _system(template: str, system: str | None) -> list[Piece]:
    if template == "vicuna":
        return []  # part of the first question
    return [Piece(IM_START, special=True), Piece(f"system\n{system or CHATML_SYSTEM}"), *_im_end()]


def _question(template: str, question: str, opening: str | None) -> list[Piece]:
    """Renders a question; `opening` is what precedes the first one in `vicuna`."""
    if template == "vicuna":
        return _split(f"{opening} " * bool(opening) + f"USER: {question} ASSISTANT:")
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
    """Splits text at `<image>`, which becomes a control token; empty text is left out."""
    pieces = []
    for number, part in enumerate(text.split(IMAGE)):
        if number:
            pieces.append(Piece(IMAGE, special=True))
        if part:
            pieces.append(Piece(part))
    return pieces
