"""Checks of tokenizer files before the tokenizers library reads them.

A small hostile file can cost the library hours or gigabytes: a regular expression with exponential
backtracking, normalizers that multiply the text, millions of nested lists. So only the components
of Qwen's byte-level BPE are accepted, in bounded sizes.
"""

import collections
import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moddistill.errors import UserError, invalid
from moddistill.storage.json_file import parse, read_text

# Files of settings that may be next to `vocab.json` and `merges.txt`.
SETTINGS = (
    "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "config.json",
)  # fmt: skip
_LARGEST_FILE = 36 * 2**20  # bytes; a vocabulary of 260,000 has 35 MB
_MOST_ENTRIES = 1_000_000  # of a vocabulary, or merges, which may be lists
_MOST_ADDED_TOKENS = 10_000  # added tokens; the library searches for all of them in each text
_LARGEST_ID = 10_000_000
_MOST_DIGITS = 20  # of an id, as text

# Qwen's regular expression for words, within which bytes are merged.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Components of `tokenizer.json`: the key of a sequence's steps, and the accepted sequences of step
# types. Other types, or more steps, can multiply the length of a text at each step.
COMPONENTS: dict[str, tuple[str, tuple[list[str], ...]]] = {
    "normalizer": ("normalizers", ([], ["NFC"])),
    "pre_tokenizer": ("pretokenizers", (["ByteLevel"], ["Split", "ByteLevel"])),
    "decoder": ("decoders", (["ByteLevel"],)),
    "post_processor": ("processors", ([], ["ByteLevel"], ["TemplateProcessing"])),
}
_FIRST = {"Sequence": {"id": "A", "type_id": 0}}
_SECOND = {"Sequence": {"id": "B", "type_id": 1}}
# Types whose fields are dangerous (a regular expression or a template of a few characters can take
# hours or gigabytes), with the only values accepted.
_EXACT_FIELDS: dict[str, dict[str, Any]] = {
    "Split": {"pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": False},
    "TemplateProcessing": {"single": [_FIRST], "pair": [_FIRST, _SECOND], "special_tokens": {}},
}
# Settings of BPE that change ids or make them random.
_UNSUPPORTED = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("fuse_unk", "byte_fallback", "ignore_merges"),
)


def read_fields(file: Path) -> dict[str, Any]:
    """Reads the object in a JSON file of a tokenizer; UserError as `read_json`."""
    text = read_text(file, _LARGEST_FILE)
    # Before parsing: millions of lists in a few megabytes of text need gigabytes as Python objects.
    _check_count(file, "lists and objects", text.count("[") + text.count("{"))
    fields = parse(text, str(file))
    if not isinstance(fields, dict):
        raise invalid(str(file), fields, "a JSON object")
    return fields


def check_merges(file: Path) -> None:
    """Raises UserError for a `merges.txt` that is too large."""
    _check_count(file, "merges", read_text(file, _LARGEST_FILE).count("\n"))


def _check_count(file: Path, name: str, count: int, most: int = _MOST_ENTRIES) -> None:
    if count > most:
        raise UserError(f"{file}: expected at most {most:,} {name}, got {count:,}")


@contextlib.contextmanager
def only_checked_files(vocabulary: Path) -> Iterator[str]:
    """Yields a folder with the checked files only: `transformers` reads others without a bound."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("vocab.json", "merges.txt", *SETTINGS):
            if vocabulary.with_name(name).exists():
                shutil.copyfile(vocabulary.with_name(name), Path(folder) / name)
        yield folder


def check_components(file: Path, fields: dict[str, Any]) -> None:
    """Raises UserError for components or settings that Qwen's byte-level BPE does not have."""
    model = fields["model"]
    if model.get("type", "BPE") != "BPE":
        raise invalid(f"{file}: model.type", model["type"], "'BPE'")
    for name in _UNSUPPORTED:
        if model.get(name):
            raise invalid(f"{file}: model.{name}", model[name], "null")
    for name, inside, most in (
        ("added_tokens", fields, _MOST_ADDED_TOKENS),
        ("merges", model, _MOST_ENTRIES),
        ("vocab", model, _MOST_ENTRIES),
    ):
        entries = inside.get(name)
        _check_count(file, name, len(entries) if isinstance(entries, list | dict) else 0, most)
    for name, (steps_key, accepted) in COMPONENTS.items():
        _check_component(f"{file}: {name}", fields.get(name), steps_key, accepted)


def _check_component(
    origin: str, component: Any, steps_key: str, accepted: Sequence[list[str]]
) -> None:
    steps = _steps(component, steps_key)
    types = [step["type"] if _is_typed(step) else repr(step) for step in steps]
    if types not in accepted:
        choices = " or ".join(" + ".join(choice) or "null" for choice in accepted)
        raise invalid(f"{origin}.type", " + ".join(types) or "null", choices)
    for step in steps:
        for field, value in _EXACT_FIELDS.get(step["type"], {}).items():
            if step.get(field) != value:
                raise invalid(f"{origin}: {step['type']}.{field}", step.get(field), repr(value))


def _steps(component: Any, steps_key: str) -> list[Any]:
    """Returns the steps of a component: none, itself, or the first three of a sequence.

    Three are enough to see that a sequence is longer than any accepted one.
    """
    if component is None:
        return []
    is_sequence = _is_typed(component) and component["type"] == "Sequence"
    steps = component.get(steps_key) if is_sequence else None
    return steps[:3] if isinstance(steps, list) else [component]


def _is_typed(component: Any) -> bool:
    return isinstance(component, dict) and isinstance(component.get("type"), str)


def check_ids(file: Path, vocabulary: Any, added: Sequence[dict[str, Any]]) -> None:
    """Raises UserError for ids that are no integers, too large, or shared by two tokens."""
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    _check_count(file, "tokens", len(ids))
    for token in added:
        ids[token["content"]] = token["id"]
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number <= _LARGEST_ID:
            raise invalid(f"{file}: id of {token!r:.80}", number, f"0 to {_LARGEST_ID:,}")
    if len(set(ids.values())) < len(ids):
        [(number, times)] = collections.Counter(ids.values()).most_common(1)
        shared = [token for token in ids if ids[token] == number][:2]
        raise UserError(
            f"{file}: expected one token per id, got {times} with the id {number}, such as "
            f"{shared!r:.120}"
        )


def added_ids(file: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns {token: id} of the `added_tokens_decoder` in `tokenizer_config.json`."""
    decoder = fields.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or len(decoder) > _MOST_ADDED_TOKENS:
        expected = f"an object of up to {_MOST_ADDED_TOKENS:,} tokens"
        raise invalid(f"{file}: added_tokens_decoder", decoder, expected)
    ids = {}
    for number, token in decoder.items():
        # `check_ids` has the range; `int` refuses numbers of thousands of digits.
        is_id = number.isdecimal() and len(number) <= _MOST_DIGITS
        if not is_id or not isinstance(token, dict):
            raise invalid(f"{file}: added_tokens_decoder", {number: token}, "a token by its id")
        ids[str(token.get("content"))] = int(number)
    return ids


def check_loaded_ids(origin: Path, stated: dict[str, int], backend: Tokenizer) -> None:
    """Checks that added tokens have the ids that their file states.

    The tokenizers library renumbers added tokens where ids have gaps or are shared with the
    vocabulary, and rows of the embedding would then belong to other tokens.

    Raises:
      UserError: naming a token with both ids.
    """
    for token, number in stated.items():
        if backend.token_to_id(token) != number:
            raise UserError(
                f"{origin}: expected token {token!r:.80} at its id {number}, got "
                f"{backend.token_to_id(token)} when loaded, as ids have gaps or are shared"
            )


@contextlib.contextmanager
def library_errors(before: str, after: str = "") -> Iterator[None]:
    """Turns exceptions of a library, and Rust panics, into a UserError of one line.

    Args:
      before: text before the message of the library.
      after: text after it.
    """
    try:
        yield
    except (TimeoutError, MemoryError):
        raise
    # A panic derives from BaseException, and its class cannot be imported.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{before}{reason:.400}{after}") from None
