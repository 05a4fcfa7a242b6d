"""What a tokenizer's files may hold, so that the tokenizers library reads them safely."""

import collections
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moddistill.errors import UserError, invalid
from moddistill.storage.json_file import parse, read_text

_LARGEST_FILE = 36 * 2**20  # bytes; a vocabulary of 260,000 has 35 MB
_MOST_PARTS = 1_000_000  # tokens, or merges, each of which may be a list
_MOST_ADDED = 10_000  # added tokens; the library searches for all of them in each text
_LARGEST_ID = 10_000_000

# How Qwen cuts text into words before merging bytes.
WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Parts of `tokenizer.json`: the key of a sequence's members, and the types accepted, in order.
# Other types, or more of these, can multiply a text's length with each step.
PARTS: dict[str, tuple[str, tuple[list[str], ...]]] = {
    "normalizer": ("normalizers", ([], ["NFC"])),
    "pre_tokenizer": ("pretokenizers", (["ByteLevel"], ["Split", "ByteLevel"])),
    "decoder": ("decoders", (["ByteLevel"],)),
    "post_processor": ("processors", ([], ["ByteLevel"], ["TemplateProcessing"])),
}
_FIRST = {"Sequence": {"id": "A", "type_id": 0}}
_SECOND = {"Sequence": {"id": "B", "type_id": 1}}
# Types whose fields matter, with the only ones accepted: a regular expression or a template of a
# few characters can take hours or gigabytes.
_EXACT: dict[str, dict[str, Any]] = {
    "Split": {"pattern": {"Regex": WORD}, "behavior": "Isolated", "invert": False},
    "TemplateProcessing": {"single": [_FIRST], "pair": [_FIRST, _SECOND], "special_tokens": {}},
}
# Settings of BPE that change ids, or make them random.
_UNSET = (
    *("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("fuse_unk", "byte_fallback", "ignore_merges"),
)


def read_fields(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a tokenizer; UserError as `read_json`.

    A file of a few megabytes with millions of lists would fill gigabytes.
    """
    text = read_text(file, _LARGEST_FILE)
    _check_count(file, "lists and objects", text.count("[") + text.count("{"))
    fields = parse(text, str(file))
    if not isinstance(fields, dict):
        raise UserError(f"{file} holds {fields!r:.40}; accepted: a JSON object")
    return fields


def check_merges(file: Path) -> None:
    """Raises UserError for a `merges.txt` that is too large."""
    _check_count(file, "merges", read_text(file, _LARGEST_FILE).count("\n"))


def _check_count(file: Path, name: str, count: int, most: int = _MOST_PARTS) -> None:
    if count > most:
        raise UserError(f"{file} has {count:,} {name}; accepted: at most {most:,}")


def check_parts(file: Path, fields: dict[str, Any]) -> None:
    """Raises UserError for fields that Qwen's byte-level BPE does not have."""
    model = fields["model"]
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{file}: model.type is {model['type']!r:.80}; accepted: 'BPE'")
    for name in _UNSET:
        if model.get(name):
            raise UserError(f"{file}: model.{name} is {model[name]!r:.80}; accepted: null")
    for name, inside, most in (
        ("added_tokens", fields, _MOST_ADDED),
        ("merges", model, _MOST_PARTS),
        ("vocab", model, _MOST_PARTS),
    ):
        found = inside.get(name)
        _check_count(file, name, len(found) if isinstance(found, list | dict) else 0, most)
    for name, (inside, accepted) in PARTS.items():
        parts = _members(fields.get(name), inside)
        types = [part["type"] if _is_typed(part) else f"{part!r:.40}" for part in parts]
        if types not in accepted:
            choices = " or ".join(" + ".join(choice) or "null" for choice in accepted)
            found = " + ".join(types) or "null"
            raise UserError(f"{file}: {name} is of type {found!r:.80}; accepted: {choices}")
        for part in parts:
            for field, value in _EXACT.get(part["type"], {}).items():
                if part.get(field) != value:
                    raise UserError(
                        f"{file}: {name}: {field} of {part['type']} is {part.get(field)!r:.80}; "
                        f"accepted: Qwen's, {value!r}"
                    )


def _members(part: Any, inside: str) -> list[Any]:
    """A part's steps: none, one, or the first three of a sequence."""
    if part is None:
        return []
    members = part.get(inside) if _is_typed(part) and part["type"] == "Sequence" else None
    return members[:3] if isinstance(members, list) else [part]


def _is_typed(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("type"), str)


def check_ids(file: Path, vocabulary: Any, added: Sequence[dict[str, Any]]) -> None:
    """Raises UserError for ids that are too large, or that two tokens share."""
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    _check_count(file, "tokens", len(ids))
    for token in added:
        ids[token["content"]] = token["id"]
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number <= _LARGEST_ID:
            raise UserError(
                f"{file}: the id of {token!r:.80} is {number!r:.80}; accepted: a whole number from "
                f"0 to {_LARGEST_ID:,}"
            )
    if len(set(ids.values())) < len(ids):
        [(number, times)] = collections.Counter(ids.values()).most_common(1)
        shared = [token for token in ids if ids[token] == number][:2]
        raise UserError(
            f"{file}: {times} tokens have the id {number}, such as {shared!r:.120}; accepted: an "
            "id for each"
        )


def added_ids(file: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Ids of the `added_tokens_decoder` of `tokenizer_config.json`, by token."""
    decoder = fields.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or len(decoder) > _MOST_ADDED:
        raise invalid(f"{file}: added_tokens_decoder", decoder, f"up to {_MOST_ADDED:,} tokens")
    found = {}
    for number, token in decoder.items():
        if not number.isdecimal() or not isinstance(token, dict):
            raise invalid(f"{file}: added_tokens_decoder", {number: token}, "a token by its id")
        found[str(token.get("content"))] = int(number)
    return found


def check_loaded_ids(origin: Path, stated: dict[str, int], backend: Tokenizer) -> None:
    """Checks that added tokens have the ids that their file states.

    The tokenizers library numbers added tokens anew where ids have gaps or are shared with the
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
def in_words(before: str, after: str = "") -> Iterator[None]:
    """Turns errors of a library, and panics of Rust, into a UserError of one line."""
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
