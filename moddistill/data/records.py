"""Reads LLaVA conversation files and preference files into checked records.

A record that breaks the format is returned as `Rejected` with its reason, never repaired and never
replaced. `Quarantine` writes the rejected ones to a file, where each of them can be looked up.
"""

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moddistill.errors import UserError

IMAGE = "<image>"

# One process may reject from several threads; the file itself is safe through O_APPEND.
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One conversation: `turns` are (question, answer), `<image>` stands in the questions.

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


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """A record that is left out, and why."""

    file: str
    line: int
    reason: str


def read_conversations(path: str, image_root: str) -> tuple[list[Record], list[Rejected]]:
    """Reads LLaVA records: `conversations`, and optionally `id` and `image` (a name or a list).

    `conversations` alternates `{"from": "human", "value": ...}` and `{"from": "gpt", ...}`, begins
    with human and ends with gpt. Image names are relative to `image_root`.

    Raises:
      UserError: the file is missing or is not JSON (`.jsonl`: a line that does not parse is a
        rejected record), images are used and `image_root` is no folder, or no record is left.
    """
    return _read(path, image_root, _conversation)


def read_preferences(path: str, image_root: str) -> tuple[list[PreferencePair], list[Rejected]]:
    """Reads preference records: `conversations` ending with human, `chosen` and `rejected`.

    Instead of `conversations` a record may have `question`, a single human turn; with exactly one
    image and no `<image>` written, `<image>` and a line break are put in front of it.

    Raises:
      UserError: as `read_conversations`.
    """
    return _read(path, image_root, _preference)


def check_source(path: str, image_root: str) -> None:
    """Raises the UserError that reading gives for a missing file or a folder that images need."""
    if not os.path.isfile(path):
        raise _no_file(path)
    if not os.path.isdir(image_root):
        _check_folder(path, image_root, _items(path))


class Quarantine:
    """Appends rejected records to a JSONL file, each (file, line) once, across processes and runs.

    Worker processes may share the file: every line is one write to a descriptor opened for
    appending, and what others wrote is read before anything is added.
    """

    def __init__(self, path: str):
        self.path = path
        self._known: set[tuple[str, int]] = set()

    def add(self, rejected: Sequence[Rejected]) -> None:
        """Writes those of `rejected` that the file does not hold yet."""
        with _LOCK:
            if all((item.file, item.line) in self._known for item in rejected):
                return
            self._known = self._read()
            os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                for item in rejected:
                    if (item.file, item.line) not in self._known:
                        line = json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n"
                        os.write(descriptor, line.encode(errors="backslashreplace"))
                        self._known.add((item.file, item.line))
            finally:
                os.close(descriptor)

    @property
    def count(self) -> int:
        """Number of different records in the file, whichever process wrote them."""
        return len(self._read())

    def _read(self) -> set[tuple[str, int]]:
        if not os.path.exists(self.path):
            return set()
        # Another process may be writing the last line: what has no line break yet is not counted.
        lines = Path(self.path).read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        return {(item["file"], item["line"]) for item in map(json.loads, lines)}


def _read(path: str, image_root: str, parse: Callable[..., Any]) -> tuple[list, list[Rejected]]:
    records, rejected = [], []
    items = _items(path)
    if not items:
        raise UserError(f"{path}: there are no records in this file")
    _check_folder(path, image_root, items)
    for line, item in items:
        try:
            if isinstance(item, Exception):
                raise UserError(f"not JSON: {item}")
            if not isinstance(item, dict):
                raise UserError(f"a record is an object, not {_short(item)}")
            images = _images(item, image_root)
            name = str(item.get("id", line))
            records.append(parse(item, file=path, line=line, id=name, images=images))
        # RecursionError: the message about a deep value would be as deep.
        except (ValueError, RecursionError) as error:
            rejected.append(Rejected(path, line, str(error)))
    if not records:
        reasons = "; ".join(f"{item.line}: {item.reason}" for item in rejected[:3])
        raise UserError(f"{path}: all {len(rejected)} records are rejected ({reasons})")
    return records, rejected


def _items(path: str) -> list[tuple[int, Any]]:
    """(1-based number, parsed value or the error of its line) of each record of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise _no_file(path) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    if path.endswith(".jsonl"):
        # Not splitlines: a JSON string may hold U+2028 and its like unescaped.
        lines = enumerate(text.split("\n"), start=1)
        return [(number, _loads(line)) for number, line in lines if line.strip()]
    items = _loads(text)
    if isinstance(items, Exception):
        raise UserError(f"{path}: not JSON: {items}")
    if not isinstance(items, list):
        raise UserError(f"{path}: a JSON list of records is wanted, not {_short(items)}")
    return list(enumerate(items, start=1))


def _no_file(path: str) -> UserError:
    return UserError(f"{path!r}: no such data file; a .json or .jsonl file is wanted")


def _loads(text: str) -> Any:
    """The parsed value or the error: of syntax, of a number too long, of values nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _check_folder(path: str, image_root: str, items: list[tuple[int, Any]]) -> None:
    """A wrong folder is one mistake of the configuration, not one of every record."""
    for line, item in items if not os.path.isdir(image_root) else ():
        if isinstance(item, dict) and item.get("image"):
            raise UserError(
                f"{path}, record {line}: has an image, but {image_root!r} is no folder of images"
            )


def _images(item: dict, root: str) -> tuple[str, ...]:
    names = item.get("image")
    if names is None:
        return ()
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"image is a name or a list of names, not {_short(names)}")
    paths = tuple(os.path.join(root, name) for name in names)
    for file in paths:
        if not os.path.isfile(file):
            raise UserError(f"image file {file} is missing")
    return paths


def _conversation(item: dict, *, images: tuple[str, ...], **where: Any) -> Record:
    values = _alternating(item.get("conversations"))
    if len(values) % 2:
        raise UserError("the conversation ends with human; it must end with gpt")
    turns = tuple(zip(values[::2], values[1::2], strict=True))
    _check_turns(turns)
    _check_image_count([question for question, _ in turns], images)
    return Record(images=images, turns=turns, **where)


def _preference(item: dict, *, images: tuple[str, ...], **where: Any) -> PreferencePair:
    values = _preference_values(item, images)
    if len(values) % 2 == 0:
        raise UserError("the conversation ends with gpt; before chosen and rejected it is human")
    history = tuple(zip(values[:-1:2], values[1::2], strict=True))
    answers = {name: item.get(name) for name in ("chosen", "rejected")}
    for name, answer in answers.items():
        if not isinstance(answer, str):
            raise UserError(f"{name} is a text, not {_short(answer)}")
        _text(answer)
    if answers["chosen"] == answers["rejected"]:
        raise UserError("chosen and rejected are the same")
    _check_turns(history + tuple((values[-1], answer) for answer in answers.values()))
    _check_image_count(values[::2], images)
    return PreferencePair(images=images, history=history, question=values[-1], **answers, **where)


def _preference_values(item: dict, images: tuple[str, ...]) -> list[str]:
    if "conversations" in item:
        return _alternating(item["conversations"])
    question = item.get("question")
    if not isinstance(question, str):
        raise UserError("a preference record has conversations, or question as a text")
    if len(images) == 1 and IMAGE not in question:
        question = f"{IMAGE}\n{question}"
    return [_text(question)]


def _alternating(messages: Any) -> list[str]:
    """The texts of messages that alternate between human and gpt, human first."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"conversations is a list of messages, not {_short(messages)}")
    values = []
    for number, message in enumerate(messages, start=1):
        role = ("human", "gpt")[(number - 1) % 2]
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise UserError(f"message {number} has no text under value: {_short(message)}")
        if message.get("from") != role:
            raise UserError(f"message {number} is from {message.get('from')!r}, not {role!r}")
        values.append(_text(message["value"]))
    return values


def _text(value: str) -> str:
    """`value`, if it is Unicode: JSON can spell half characters, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text is not valid Unicode: {error}") from None
    return value


def _check_turns(turns: tuple[tuple[str, str], ...]) -> None:
    for _, answer in turns:
        if not answer.strip():
            raise UserError("an answer is empty")
        if IMAGE in answer:
            raise UserError(f"{IMAGE} stands in an answer; it belongs in a question")


def _check_image_count(questions: Sequence[str], images: tuple[str, ...]) -> None:
    written = sum(question.count(IMAGE) for question in questions)
    if written != len(images):
        raise UserError(f"{IMAGE} is written {written} times, but there are {len(images)} images")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
