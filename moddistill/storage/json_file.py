"""JSON files written by others: bounded, and with one kind of error."""

import json
from pathlib import Path
from typing import Any

from moddistill.errors import UserError

_LARGEST_FILE = 16 * 2**20  # bytes; the tokenizer settings with the most added tokens have 2 MB
_MOST_DIGITS = 300  # of a whole number; more have no float


def read_json(file: Path, largest: int = _LARGEST_FILE) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      largest: bytes that the file may have.

    Raises:
      UserError: the file is missing, larger, not JSON in UTF-8, or holds something else.
    """
    value = parse(read_text(file, largest), str(file))
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {value!r:.40}; accepted: a JSON object")
    return value


def read_text(file: Path, largest: int = _LARGEST_FILE) -> str:
    """The text of a file in UTF-8; UserError as `read_json`."""
    if not file.is_file():  # a pipe would be waited for
        kind = "is no file" if file.exists() or file.is_symlink() else "is missing"
        raise UserError(f"{str(file.parent)!r} has no {file.name}: it {kind}")
    try:
        with file.open("rb") as stream:
            data = stream.read(largest + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if len(data) > largest:
        raise UserError(f"{file} is too large; accepted: at most {largest:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 at byte {error.start}; accepted: UTF-8") from None


def parse(text: str | bytes, origin: str) -> Any:
    """Parses a JSON text; UserError naming `origin` if it is not valid."""
    try:
        return json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} is not JSON: {error}") from None


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise UserError(f"a number of {len(digits)} digits")
    return int(digits)
