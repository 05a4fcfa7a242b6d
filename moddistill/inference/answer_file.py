"""Answers to the questions of a JSONL file, in a file that grows as they finish."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moddistill.data.records import IMAGE
from moddistill.errors import UserError, did_you_mean, invalid
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import generate
from moddistill.inference.prompts import Prompt
from moddistill.storage.json_file import parse
from moddistill.storage.text_file import append_lines, replace_text

Row = dict[str, Any]

_KEYS = ("prompt", "images", "id", "system", "history")  # of a question


def answer_file(
    load: Callable[[], Sequence[Any]],
    questions: Path,
    out: Path,
    decoding: Decoding,
    model: dict[str, str],
) -> int:
    """Answers the questions that `out` has no answer of yet.

    A row has the question, the answer, and under `settings` what else the answer depends on. A
    question that cannot be answered, such as one whose image cannot be read, gets a row with an
    `error`; the same call again tries it once more.

    Args:
      load: returns model, parameters and tokenizer; not called if all is answered.
      model: its name as `model`, the digest of its files as `weights`, and how it is computed.

    Returns:
      The number of rows with an error.

    Raises:
      UserError: a line is no question, `out` has damaged rows or answers to other questions or
        with other settings, or the disk is full.
    """
    prompts = _read_prompts(questions)
    settings = _settings(decoding, model)
    done = _read_answered(out, prompts, questions, settings)
    replace_text(out, "".join(_line(row) for row in done.values()))
    todo = [line for line in prompts if line not in done]
    if not todo:
        return 0
    failed = 0

    def write(number: int, fields: Row) -> None:
        line = todo[number]
        row = {"line": line, "id": prompts[line].id, **prompts[line].asked, "settings": settings}
        # Half of a surrogate pair, which JSON can spell and UTF-8 cannot, stays an escape.
        append_lines(out, _line(row | fields).encode(errors="backslashreplace"))
        bar.update()

    def write_error(number: int, error: UserError) -> None:
        nonlocal failed
        failed += 1
        write(number, {"error": str(error)})

    asked = [prompts[line].prompt for line in todo]
    with tqdm(
        total=len(prompts), initial=len(done), desc="answers", unit="answer", mininterval=1.0
    ) as bar:
        for number, answer in generate(*load(), asked, decoding, write_error, todo):
            write(number, dataclasses.asdict(answer))
    return failed


@dataclasses.dataclass(frozen=True)
class _Question:
    id: Any
    asked: Row  # of the prompt, as a row has it
    prompt: Prompt


def _settings(decoding: Decoding, model: dict[str, str]) -> Row:
    """Returns what answers depend on besides their question, as a row has it."""
    fields = dataclasses.asdict(decoding)
    return model | fields.pop("sampling") | fields | {"stop": list(decoding.stop)}


def _read_prompts(file: Path) -> dict[int, _Question]:
    """Returns the questions by their line, from 1."""
    lines = enumerate(file.read_bytes().split(b"\n"), start=1)
    found = {
        number: _question(line, f"{file}, line {number}", file)
        for number, line in lines
        if line.strip()
    }
    if not found:
        raise UserError(f"{file}: expected at least one question, got none")
    return found


def _question(line: bytes, origin: str, file: Path) -> _Question:
    fields = parse(line, origin)
    if not isinstance(fields, dict) or not isinstance(fields.get("prompt"), str):
        raise invalid(origin, fields, "an object with a text `prompt`")
    for key in fields:
        if key not in _KEYS:
            error = invalid(origin, key, f"the keys {', '.join(map(repr, _KEYS))}")
            raise UserError(f"{error}{did_you_mean(key, _KEYS)}")
    images, history = fields.get("images", []), fields.get("history", [])
    if not isinstance(images, list) or not all(isinstance(each, str) for each in images):
        raise invalid(f"{origin}: images", images, "a list of file names")
    pairs = isinstance(history, list) and all(_is_pair(turn) for turn in history)
    if not pairs:
        raise invalid(f"{origin}: history", history, "a list of pairs of question and answer")
    system = fields.get("system")
    if not isinstance(system, str | None):
        raise invalid(f"{origin}: system", system, "a text")
    asked = fields["prompt"]
    if not any(IMAGE in text for text in (asked, *(turn[0] for turn in history))):
        asked = f"{IMAGE}\n" * len(images) + asked
    paths = tuple(str(file.parent / name) for name in images)
    turns = tuple((turn[0], turn[1]) for turn in history)
    row = {"prompt": asked, "images": images, "system": system, "history": history}
    return _Question(fields.get("id"), row, Prompt(asked, paths, turns, system))


def _is_pair(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(x, str) for x in turn)


def _read_answered(
    out: Path, questions: dict[int, _Question], file: Path, settings: Row
) -> dict[int, Row]:
    """Returns the answers so far by their line; a cut last line and errors are left out."""
    if not out.exists():
        return {}
    done = {}
    for number, line in enumerate(out.read_bytes().split(b"\n")[:-1], start=1):
        origin = f"{out}, line {number}"
        try:
            row = parse(line, origin)
        except UserError as error:
            todo = "delete this line, and its question is answered again"
            raise UserError(f"{error}; {todo}") from None
        asked = row.get("line") if isinstance(row, dict) else None
        if not isinstance(asked, int) or asked not in questions:
            raise invalid(origin, row, f"an answer to a line of {file}, or another --out")
        if "error" not in row:
            _check_same(row, questions[asked], settings, origin)
            done[asked] = row
    return done


def _check_same(row: Row, question: _Question, settings: Row, origin: str) -> None:
    """Raises UserError if an answer has another question or other settings than this call."""
    before = row.get("settings")
    before = dict(before) if isinstance(before, dict) else {}
    if before.get("weights") == settings["weights"]:
        before["model"] = settings["model"]  # a folder may be moved
    then = row | before
    for name, now in (question.asked | settings).items():
        if then.get(name) != now:
            raise invalid(f"{origin}: {name}", then.get(name), f"{now!r} as now, or another --out")


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
