"""Tokenizers that other libraries read, which would crash, fill memory or give random ids.

They are opened in a process of their own by `hostile_bombs`: what they take would be hidden by an
earlier peak of memory.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.convert.hostile import put
from tests.convert.hostile_folders import read_json

MIB = 2**20
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
FIRST = {"Sequence": {"id": "A", "type_id": 0}}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(key: str, members: list[Any]) -> dict[str, Any]:
    return {"type": "Sequence", key: members}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return _sequence("pretokenizers", [split | {"invert": False}, BYTES])


def _template(count: int) -> dict[str, Any]:
    pair = [FIRST, {"Sequence": {"id": "B", "type_id": 1}}]
    many = {"type": "TemplateProcessing", "single": [FIRST] * count, "pair": pair}
    return many | {"special_tokens": {}}


def _added(count: int) -> list[dict[str, Any]]:
    settings = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    controls = [
        {"id": 1000 + i, "content": token, "normalized": False, **settings}
        for i, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"))
    ]
    return controls + [
        {"id": 2000 + i, "content": f"{i:07}", "normalized": True, **settings} for i in range(count)
    ]


TEN = ({"Regex": "."}, "aaaaaaaaaa")
# Fields of tokenizer.json: the path to each, its value, and a part of the error. Large values are
# made when they are written: the garbage collector goes through those that exist.
FIELDS: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "a table of characters that is broken": (
        ("normalizer",),
        {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="},
        "normalizer.type: expected null or NFC, got 'Precompiled'",
    ),
    "nothing replaced by much": (
        ("normalizer",),
        _replace({"Regex": ""}, "a" * 100_000),
        "normalizer.type: expected null or NFC, got 'Replace'",
    ),
    "ten times as much, six times": (
        ("normalizer",),
        _sequence("normalizers", [_replace(*TEN)] * 6),
        "normalizer.type: expected null or NFC, got 'Replace + Replace",
    ),
    "a sequence in a sequence": (
        ("normalizer",),
        _sequence("normalizers", [_sequence("normalizers", [_replace(*TEN)])]),
        "normalizer.type: expected null or NFC, got 'Sequence'",
    ),
    "a normalizer without a type": (
        ("normalizer",),
        {"precompiled_charsmap": "AAAAAA=="},
        "normalizer.type: expected null or NFC, got \"{'precomp",
    ),
    "a pattern that is large when compiled": (
        ("pre_tokenizer",),
        _split("(?:(?:(?:abc){900}){900}){900}"),
        "pre_tokenizer: Split.pattern: expected {'Regex': ",
    ),
    "a pattern that takes exponential time": (
        ("pre_tokenizer",),
        _split("(?:(?:.*)*)*(?:(?:.*)*)*x"),
        "pre_tokenizer: Split.pattern: expected {'Regex': ",
    ),
    "bytes of bytes, forty times": (
        ("pre_tokenizer",),
        _sequence("pretokenizers", [BYTES] * 40),
        "pre_tokenizer.type: expected ByteLevel or Split + ByteLevel, got 'ByteLevel + ByteLevel",
    ),
    "words that are not cut into bytes": (
        ("pre_tokenizer",),
        {"type": "Whitespace"},
        "pre_tokenizer.type: expected ByteLevel or Split + ByteLevel, got 'Whitespace'",
    ),
    "texts of ten times as much, nine times": (
        ("post_processor",),
        _sequence("processors", [_template(10)] * 9),
        "post_processor.type: expected null or ByteLevel or TemplateProcessing, "
        "got 'TemplateProcessing + Temp",
    ),
    "texts thrice": (("post_processor",), _template(3), "TemplateProcessing.single: expected [{"),
    "a decoder that replaces": (
        ("decoder",),
        _sequence("decoders", [_replace(*TEN)] * 6),
        "decoder.type: expected ByteLevel, got 'Replace + Replace",
    ),
    "no decoder": (("decoder",), None, "decoder.type: expected ByteLevel, got 'null'"),
    "a prefix of parts": (
        ("model", "continuing_subword_prefix"),
        "zz",
        "model.continuing_subword_prefix: expected null, got 'zz'",
    ),
    "a suffix of words": (
        ("model", "end_of_word_suffix"),
        "z",
        "model.end_of_word_suffix: expected null, got 'z'",
    ),
    "random ids": (("model", "dropout"), 0.5, "model.dropout: expected null, got 0.5"),
    "an unknown token": (("model", "unk_token"), "a", "model.unk_token: expected null, got 'a'"),
    "another kind of model": (
        ("model", "type"),
        "Unigram",
        "model.type: expected 'BPE', got 'Unigram'",
    ),
    "200,000 added tokens": (
        ("added_tokens",),
        lambda: _added(200_000),
        "expected at most 10,000 added_tokens, got 200,004",
    ),
    "34 MB of added tokens": (
        ("added_tokens",),
        lambda: [[]] * (11 * MIB),
        "expected at most 1,000,000 lists and objects, got ",
    ),
    "34 MB of merges": (
        ("model", "merges"),
        lambda: ["a b"] * (5 * MIB),
        "expected at most 1,000,000 merges, got 5,242,880",
    ),
    "34 MB of steps": (
        ("normalizer",),
        lambda: _sequence("normalizers", [[]] * (11 * MIB)),
        "expected at most 1,000,000 lists and objects, got ",
    ),
    "30 MB of tokens": (
        ("model", "vocab"),
        lambda: {f"{i:x}": i for i in range(2 * MIB)},
        "expected at most 1,000,000 vocab, got 2,097,152",
    ),
    "34 MB of objects": (
        ("more",),
        lambda: [{}] * (11 * MIB),
        "expected at most 1,000,000 lists and objects, got ",
    ),
}


def changed(keys: tuple[str, ...], value: Any) -> Callable[[Path], None]:
    """Writes a value into a folder's tokenizer.json."""

    def corrupt(folder: Path) -> None:
        file = folder / "tokenizer.json"
        new = value() if callable(value) else value
        file.write_text(json.dumps(put(read_json(file), keys, new), separators=(",", ":")))

    return corrupt
