"""Errors that users can act on, and the wording that they share.

Every check of user input raises `UserError`; commands show its message as one line without a
traceback. All other exceptions are defects and keep their traceback.
"""

import contextlib
import difflib
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

_LONGEST_VALUE = 200  # characters of a value in a message
_MOST_BITS = 4096  # of an integer that is shown; Python refuses to write 4300 digits
# Characters that a terminal acts on, and those that turn the direction of text; no line break, no
# tab.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """A setting, file or argument is wrong; the message names value, origin and expectation."""


class DivergedError(UserError, FloatingPointError):
    """A loss or parameter is no longer finite."""


class StoppedError(Exception):
    """A run was asked to stop, and has saved what it has; the same call resumes it.

    `exit_code` is that of a process which the signal ended.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def invalid(origin: str, value: Any, expected: str) -> UserError:
    """Returns the error for a value that is not what `origin` needs.

    >>> invalid("config.optim.lr", -1.0, ">= 0")
    UserError('config.optim.lr: expected >= 0, got -1.0')
    """
    return UserError(f"{origin}: expected {expected}, got {_short(value)}")


def not_one_of(origin: str, value: Any, choices: Iterable[str]) -> UserError:
    """Returns the error for a value outside an enumeration, with the closest choice if any.

    >>> not_one_of("config.moe.dispatch", "droples", ("dropless", "capacity"))
    UserError("config.moe.dispatch: expected one of 'dropless', 'capacity', got 'droples' (did you mean 'dropless'?)")
    """  # noqa: E501
    choices = list(choices)
    names = ", ".join(map(repr, choices))
    return UserError(
        f"{origin}: expected one of {names}, got {_short(value)}{did_you_mean(value, choices)}"
    )


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
    """Returns ` (did you mean 'X'?)` for the choice closest to `value`, or an empty string."""
    if not isinstance(value, str) or len(value) > _LONGEST_VALUE:
        return ""
    close = difflib.get_close_matches(value, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def one_line(text: str) -> str:
    r"""Returns a text of at most 200 characters on one line, with control characters escaped.

    >>> one_line("a\nb")
    'a\\nb'
    """
    start = text[: _LONGEST_VALUE + 1]
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in start
    )
    return _at_most(escaped, _LONGEST_VALUE)


def printable(text: str) -> str:
    r"""Returns a text for a terminal: control characters but line breaks and tabs are escaped.

    The escapes are those of JSON, so that JSON stays JSON of the same content.

    >>> printable("a\x1b[31m\tb")
    'a\\u001b[31m\tb'
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def escape_logged(record: logging.LogRecord) -> bool:
    """Escapes control characters in the message of a log record; a filter that keeps all."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def _short(value: Any) -> str:
    """Returns `repr(value)` up to 200 characters, in a time that does not grow with the value."""
    return _at_most(_repr_start(value, _LONGEST_VALUE), _LONGEST_VALUE)


def _repr_start(value: Any, length: int) -> str:
    """Returns `repr(value)`, or the start of one that is longer than `length`.

    Only texts, bytes, lists and dicts, which records consist of, are cut. Each level of nesting
    adds a character, so at most `length` levels are visited.
    """
    if type(value) in (str, bytes):
        return repr(value[:length])
    if type(value) is int and value.bit_length() > _MOST_BITS:
        return f"an integer of {value.bit_length():,} bits"
    if type(value) not in (list, dict) or not value:
        return repr(value)
    text = opening = "[" if type(value) is list else "{"
    for item in value:
        if len(text) > length:
            break
        text += ", " if text != opening else ""
        text += _repr_start(item, max(0, length - len(text)))
        if type(value) is dict:
            text += ": " + _repr_start(value[item], max(0, length - len(text)))
    return text + ("]" if type(value) is list else "}")


def _at_most(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


@contextlib.contextmanager
def at_field(name: str) -> Iterator[None]:
    """Puts the name of a setting before the message of a `UserError` raised inside.

    A message that names a setting already (`config.x` in `config.y`) stays as it is. One that
    begins with the last part of the name continues it.

        with at_field("config.student"):
            read_model_config("runs/x")  # config.student: expected a model folder, ...
        with at_field("config.moe"):
            check_moe(config.moe)  # config.moe.top_k: expected 1 to 4, got 5
    """
    try:
        yield
    except UserError as error:
        text, (part, _, last) = str(error), name.rpartition(".")
        if text.startswith(name.partition(".")[0] + "."):
            raise
        message = f"{part}.{text}" if text.startswith(f"{last}.") else f"{name}: {text}"
        raise UserError(message) from error
