"""Readers of LLaVA conversation files and preference files: JSON or JSONL to checked records.

A record that breaks the format is returned as `Rejected` with its reason, never repaired and never
replaced by another.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moddistill.data.quarantine import Rejected
from moddistill.errors import UserError, invalid

IMAGE = "<image>"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One conversation: `turns` are (question, answer) pairs, with `<image>` in the questions.

    `line` is 1-based: the line of a JSONL file, the element of a JSON list.
    """

    file: str
    line: int
    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one question, which may follow earlier turns (`history`)."""

    file: str
    line: int
    id: str
    images: tuple[str, ...]
    history: tuple[tuple[str, str], ...]
    question: str
    chosen: str
    rejected: str


def read_conversations(path: str, image_root: str) -> tuple[list[Record], list[Rejected]]:
    """Reads LLaVA records: `conversations`, and optionally `id` and `image` (a name or a list).

    `conversations` alternates `{"from": "human", "value": ...}` and `{"from": "gpt", ...}`, starts
    with human and ends with gpt. Image names are relative to `image_root`.

    Raises:
      UserError: the file is missing or not JSON (a line of `.jsonl` that does not parse is a
        rejected record), images are used and `image_root` is no folder, or every record is
        rejected.
    """
    return _read_file(path, image_root, _parse_conversation)


def read_preferences(path: str, image_root: str) -> tuple[list[PreferencePair], list[Rejected]]:
    """Reads preference records: `conversations` ending with human, `chosen` and `rejected`.

    Instead of `conversations` a record may have `question`, a single human turn; with exactly one
    image and no `<image>`, `<image>` and a line break are prepended to it.

    Raises:
      UserError: as `read_conversations`.
    """
    return _read_file(path, image_root, _parse_preference)


def check_source(path: str, image_root: str) -> None:
    """Raises the UserError of the readers for a missing file or a missing image folder."""
    if not os.path.isfile(path):
        raise _missing_file(path)
    if not os.path.isdir(image_root):
        _check_image_root(path, image_root, _read_items(path))


def _read_file(
    path: str, image_root: str, parse: Callable[..., Any]
) -> tuple[list[Any], list[Rejected]]:
    records, rejected = [], []
    items = _read_items(path)
    if not items:
        raise UserError(f"{path}: expected at least one record, got none")
    _check_image_root(path, image_root, items)
    for line, item in items:
        try:
            if isinstance(item, Exception):
                raise UserError(f"expected JSON, got text that does not parse: {item}")
            if not isinstance(item, dict):
                raise invalid("record", item, "a JSON object")
            images = _image_paths(item, image_root)
            name = str(item.get("id", line))
            records.append(parse(item, file=path, line=line, id=name, images=images))
        # A deeply nested value parses, but the repr in its error message exceeds the recursion
        # limit.
        except (ValueError, RecursionError) as error:
            rejected.append(Rejected(path, line, str(error)))
    if not records:
        reasons = "; ".join(f"{item.line}: {item.reason}" for item in rejected[:3])
        raise UserError(
            f"{path}: expected a valid record, got {len(rejected)} rejected ones ({reasons})"
        )
    return records, rejected


def _read_items(path: str) -> list[tuple[int, Any]]:
    """Returns (1-based number, parsed value or the error of its line) for each record of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise _missing_file(path) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got {error}") from None
    if path.endswith(".jsonl"):
        # Not splitlines: a JSON string may contain an unescaped U+2028 or U+0085.
        lines = enumerate(text.split("\n"), start=1)
        return [(number, _parse_json(line)) for number, line in lines if line.strip()]
    items = _parse_json(text)
    if isinstance(items, Exception):
        raise UserError(f"{path}: expected JSON, got text that does not parse: {items}")
    if not isinstance(items, list):
        raise invalid(path, items, "a JSON list of records")
    return list(enumerate(items, start=1))


def _missing_file(path: str) -> UserError:
    return UserError(f"{path}: expected a .json or .jsonl file, got none")


def _parse_json(text: str) -> Any:
    """Returns the value or the error: of syntax, an overlong number, values nested too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _check_image_root(path: str, image_root: str, items: list[tuple[int, Any]]) -> None:
    """Raises UserError once for a missing image folder, instead of rejecting every record."""
    for line, item in items if not os.path.isdir(image_root) else ():
        if isinstance(item, dict) and item.get("image"):
            raise invalid(
                f"image folder of {path}",
                image_root,
                f"an existing folder, since record {line} has an image",
            )


def _image_paths(item: dict[str, Any], root: str) -> tuple[str, ...]:
    names = item.get("image")
    if names is None:
        return ()
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise invalid("image", names, "a name or a list of names")
    for name in names:
        if not os.path.isfile(os.path.join(root, name)):
            raise invalid("image", name, f"the name of a file in {root!r}")
    return tuple(os.path.join(root, name) for name in names)


def _parse_conversation(item: dict[str, Any], *, images: tuple[str, ...], **source: Any) -> Record:
    texts = _message_texts(item.get("conversations"))
    if len(texts) % 2:
        raise invalid("conversations[-1].from", "human", "'gpt'")
    turns = tuple(zip(texts[::2], texts[1::2], strict=True))
    _check_answers(turns)
    _check_image_count([question for question, _ in turns], images)
    return Record(images=images, turns=turns, **source)


def _parse_preference(
    item: dict[str, Any], *, images: tuple[str, ...], **source: Any
) -> PreferencePair:
    texts = _preference_texts(item, images)
    if len(texts) % 2 == 0:
        raise invalid("conversations[-1].from", "gpt", "'human', before chosen and rejected")
    # Human texts have even indices, the last one is the question of the pair.
    history = tuple(zip(texts[:-1:2], texts[1::2], strict=True))
    answers = {name: item.get(name) for name in ("chosen", "rejected")}
    for name, answer in answers.items():
        if not isinstance(answer, str):
            raise invalid(name, answer, "a text")
        _check_unicode(answer)
    if answers["chosen"] == answers["rejected"]:
        raise invalid("rejected", answers["rejected"], "another text than chosen")
    _check_answers(history + tuple((texts[-1], answer) for answer in answers.values()))
    _check_image_count(texts[::2], images)
    return PreferencePair(images=images, history=history, question=texts[-1], **answers, **source)


def _preference_texts(item: dict[str, Any], images: tuple[str, ...]) -> list[str]:
    if "conversations" in item:
        return _message_texts(item["conversations"])
    question = item.get("question")
    if not isinstance(question, str):
        raise invalid("question", question, "a text, in a record without conversations")
    if len(images) == 1 and IMAGE not in question:
        question = f"{IMAGE}\n{question}"
    return [_check_unicode(question)]


def _message_texts(messages: Any) -> list[str]:
    """Returns the texts of messages that alternate between human and gpt, human first."""
    if not isinstance(messages, list) or not messages:
        raise invalid("conversations", messages, "a list of messages")
    texts = []
    for number, message in enumerate(messages):
        role = ("human", "gpt")[number % 2]
        origin = f"conversations[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise invalid(origin, message, "an object whose value is a text")
        if message.get("from") != role:
            raise invalid(f"{origin}.from", message.get("from"), repr(role))
        texts.append(_check_unicode(message["value"]))
    return texts


def _check_unicode(text: str) -> str:
    """Returns `text`; UserError for a lone surrogate, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text: expected valid Unicode, got {error}") from None
    return text


def _check_answers(turns: tuple[tuple[str, str], ...]) -> None:
    for _, answer in turns:
        if not answer.strip():
            raise invalid("answer", answer, "a text that is not blank")
        if IMAGE in answer:
            raise invalid("answer", answer, f"no {IMAGE}, which only questions contain")


def _check_image_count(questions: Sequence[str], images: tuple[str, ...]) -> None:
    """Raises UserError unless the questions contain `<image>` once for each image."""
    placeholders = sum(question.count(IMAGE) for question in questions)
    if placeholders != len(images):
        raise invalid(f"number of {IMAGE}", placeholders, f"{len(images)}, one per image")
