"""Reads JSON files of any origin, with a bound on their size and `UserError` for every fault.

Files of our own are written at once or not at all.
"""

import json
from pathlib import Path
from typing import Any

from moddistill.errors import UserError, invalid
from moddistill.params import flatten
from moddistill.storage.text_file import replace_text

_LARGEST_FILE = 16 * 2**20  # bytes; the tokenizer settings with the most added tokens have 2 MB
_MOST_DIGITS = 300  # of an integer; larger ones overflow a float


def read_json(file: Path, largest: int = _LARGEST_FILE) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Args:
      largest: bytes that the file may have.

    Raises:
      UserError: if the file is missing, larger, not JSON in UTF-8, or not an object.
    """
    value = parse(read_text(file, largest), str(file))
    if not isinstance(value, dict):
        raise invalid(str(file), value, "a JSON object")
    return value


def read_text(file: Path, largest: int = _LARGEST_FILE) -> str:
    """Reads a file in UTF-8; UserError as for `read_json`."""
    if not file.is_file():  # reading a pipe would not end
        kind = "something else" if file.exists() or file.is_symlink() else "none"
        raise UserError(f"{file}: expected a file, got {kind}")
    try:
        with file.open("rb") as stream:
            # One byte beyond the bound suffices to detect a larger file, whatever its stated size.
            data = stream.read(largest + 1)
    except OSError as error:
        raise UserError(f"{file}: expected a readable file, got {error.strerror!r}") from None
    if len(data) > largest:
        raise UserError(f"{file}: expected at most {largest:,} bytes, got more")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: expected UTF-8, got another byte at {error.start}") from None


def parse(text: str | bytes, origin: str) -> Any:
    """Parses a JSON text; UserError naming `origin` if it is invalid."""
    try:
        # Deeply nested values exceed Python's recursion limit.
        return json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: expected JSON, got invalid text ({error})") from None


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file in UTF-8; an interrupted write leaves the file as it was.

    Raises:
      ValueError: for NaN and infinity, which are not JSON.
      UserError: the disk is full.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(file, text + "\n")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise UserError(f"an integer of {len(digits)} digits")
    return int(digits)


def changed_values(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the values that differ between two nested objects, both, by their dotted names."""
    # Both sides go through JSON, in which tuples are lists.
    old, new = (flatten(json.loads(json.dumps(each))) for each in (then, now))
    pairs = {key: (old.get(key), new.get(key)) for key in new | old}
    return {key.replace("/", "."): pair for key, pair in pairs.items() if pair[0] != pair[1]}
