"""Hostile inputs: each file that a user can pass, corrupted in one way per case.

A case is a copy of an intact folder, a change, and the reader that opens it. `cases` draws from
a table of fields and values with one seed, and adds the ones written by hand.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.convert.hostile_folders import read_json, write_json, write_model_json

DEEP = "[" * 100_000
# What a field of JSON is replaced by.
VALUES: dict[str, Any] = {
    "null": None,
    "zero": 0,
    "minus one": -1,
    "billion": 10**9,
    "googol": 10**400,
    "infinity": float("inf"),
    "NaN": float("nan"),
    "true": True,
    "text": "x",
    "long text": "x" * 100_000,
    "surrogate": "\ud800",
    "list": [],
    "lists": [[None]],
    "object": {},
    "fraction": 2.5,
}
# fmt: off
LANGUAGE = [
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "max_position_embeddings", "use_sliding_window",
    "quantization_config",
]
SPARSE = [
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers",
    "norm_topk_prob", "decoder_sparse_step",
]
TOWER = [
    "model_type", "image_size", "patch_size", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps",
]
LLAVA = [
    "image_token_index", "vision_feature_layer", "vision_feature_select_strategy",
    "projector_hidden_act", "multimodal_projector_bias", "tie_word_embeddings", "text_config",
    "vision_config",
]
ORIGINAL = [
    "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "model_type",
    "num_key_value_heads", "num_hidden_layers", "num_attention_heads",
]
DECODER = [
    "vocab_size", "real_ids", "hidden_size", "intermediate_size", "num_layers", "num_heads",
    "num_kv_heads", "head_dim", "rope_theta", "norm_eps", "tie_word_embeddings", "qkv_bias",
    "qk_norm", "moe",
]
EXPERTS = [
    "num_experts", "top_k", "placement", "norm_topk_prob", "dispatch", "capacity_factor",
    "residual", "moe_intermediate_size",
]
VISION = [
    "image_size", "patch_size", "hidden_size", "intermediate_size", "num_layers",
    "num_heads", "select_layer", "activation", "norm_eps", "class_token", "pre_norm",
    "patch_bias", "mean", "std",
]
TOKENIZER = ["normalizer", "pre_tokenizer", "decoder", "post_processor"]
BPE = ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"]
SOURCE = [
    "from", "stored_head",
]
# fmt: on


class Case(NamedTuple):
    """A copy of the folder `base`, changed by `corrupt` and opened by `reader`."""

    name: str
    base: str
    reader: str
    corrupt: Callable[[Path], None]


def put(value: Any, keys: Sequence[str | int], new: Any) -> Any:
    """Replaces the entry at the path `keys` of `value`; creates missing objects."""
    if not keys:
        return new
    inside = value if isinstance(value, list) else dict(value or {})
    if isinstance(inside, dict):
        inside[keys[0]] = put(inside.get(keys[0]), keys[1:], new)
    else:
        inside[keys[0]] = put(inside[keys[0]], keys[1:], new)
    return inside


def json_case(
    base: str, reader: str, file: str, keys: Sequence[str | int], name: str, value: Any
) -> Case:
    """A case in which one field of a JSON file has another value."""

    def corrupt(folder: Path) -> None:
        changed = put(read_json(folder / file), keys, value)
        if file == "model.json":
            write_model_json(folder, changed)
        else:
            write_json(folder / file, changed)

    path = ".".join(map(str, keys))
    return Case(f"{reader} {base}: {file}: {path} is {name}", base, reader, corrupt)


def field_cases(
    base: str, reader: str, file: str, fields: Sequence[str], inside: Sequence[str] = ()
) -> list[Case]:
    """One case a field and value."""
    return [
        json_case(base, reader, file, (*inside, field), name, value)
        for field in fields
        for name, value in VALUES.items()
    ]


def sample_cases(rng: random.Random, size: int, found: list[Case]) -> list[Case]:
    return rng.sample(found, min(size, len(found))) if size else found


def config_cases(rng: random.Random, share: float) -> Iterator[Case]:
    """Fields of config.json."""
    tables = (
        ("language", "import", LANGUAGE, ()),
        ("language", "import", ("rope_theta", "rope_type"), ("rope_parameters",)),
        ("sparse", "import", SPARSE, ()),
        ("llava", "import", LLAVA, ()),
        ("llava", "inspect", LANGUAGE, ("text_config",)),
        ("llava", "inspect", TOWER, ("vision_config",)),
        ("tower", "vision", TOWER, ()),
        ("original", "with tower", ORIGINAL, ()),
    )
    for base, reader, fields, inside in tables:
        found = field_cases(base, reader, "config.json", fields, inside)
        yield from sample_cases(rng, round(share * len(found)), found)


def model_cases(rng: random.Random, share: float) -> Iterator[Case]:
    """Fields of model.json."""
    tables = (
        (DECODER, ("architecture", "decoder")),
        (EXPERTS, ("architecture", "decoder", "moe")),
        (VISION, ("architecture", "vision")),
        (
            ("decoder", "vision", "projector", "template", "image_token_id", "context"),
            ("architecture",),
        ),
        (("version", "architecture", "source"), ()),
        (SOURCE, ("source", "imported")),
    )
    readers = ("inspect", "load", "export")
    for fields, inside in tables:
        reader = readers[len(inside) % 3] if "imported" not in inside else "export"
        found = field_cases("model", reader, "model.json", fields, inside)
        yield from sample_cases(rng, round(share * len(found)), found)


def other_json_cases(rng: random.Random, share: float) -> Iterator[Case]:
    """Fields of processors, tokenizers and indices."""
    tables = (
        ("tower", "vision", "preprocessor_config.json", ("image_mean", "image_std"), ()),
        ("language", "tokenizer", "tokenizer.json", ("model", "added_tokens"), ()),
        ("language", "tokenizer", "tokenizer.json", ("vocab", "merges", "type"), ("model",)),
        ("language", "tokenizer", "tokenizer.json", ("id", "content"), ("added_tokens", 0)),
        ("language", "tokenizer", "tokenizer.json", TOKENIZER, ()),
        ("language", "tokenizer", "tokenizer.json", BPE, ("model",)),
        ("vocabulary", "tokenizer", "vocab.json", ("a", "<|endoftext|>"), ()),
        ("vocabulary", "tokenizer", "tokenizer_config.json", ("tokenizer_class",), ()),
        ("shards", "import", "model.safetensors.index.json", ("weight_map",), ()),
        ("shards", "inspect", "model.safetensors.index.json", ("lm_head.weight",), ("weight_map",)),
    )
    for base, reader, file, fields, inside in tables:
        found = field_cases(base, reader, file, fields, inside)
        yield from sample_cases(rng, round(share * len(found)), found)


def file_cases() -> Iterator[Case]:
    """Files with other content."""
    files = (
        ("language", "import", "config.json"),
        ("language", "import", "tokenizer.json"),
        ("llava", "import", "preprocessor_config.json"),
        ("language", "import", "generation_config.json"),
        ("llava", "import", "chat_template.jinja"),
        ("vocabulary", "tokenizer", "vocab.json"),
        ("vocabulary", "tokenizer", "merges.txt"),
        ("vocabulary", "tokenizer", "tokenizer_config.json"),
        ("language", "import", "model.safetensors"),
        ("shards", "import", "model.safetensors.index.json"),
        ("original", "inspect", "pytorch_model.bin"),
        ("model", "load", "model.json"),
        ("model", "export", "tokenizer.json"),
    )
    for base, reader, file in files:
        for name, corrupt in SPOILT.items():
            # A chat template is copied as text, without a check.
            if file.endswith(".jinja") and name not in UNREADABLE:
                continue

            def change(folder: Path, corrupt=corrupt, file=file) -> None:
                corrupt(folder / file)

            yield Case(f"{reader} {base}: {file} is {name}", base, reader, change)
    for name in ("a folder", "a pipe", "a link to /dev/zero"):

        def spoil(folder: Path, name=name) -> None:
            (folder / "projector.safetensors").unlink()  # the reader takes the only file
            SPOILT[name](folder / "projector.bin")

        yield Case(f"projector: projector.bin is {name}", "projector", "projector", spoil)


def _rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda file: file.write_bytes(change(file.read_bytes())) and None


def _instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def corrupt(file: Path) -> None:
        file.unlink()
        make(file)

    return corrupt


UNREADABLE = ("not UTF-8", "a folder", "a pipe", "a link to itself", "a link to /dev/zero")
SPOILT: dict[str, Callable[[Path], None]] = {
    "empty": _rewrite(lambda data: b""),
    "cut in half": _rewrite(lambda data: data[: len(data) // 2]),
    "not UTF-8": _rewrite(lambda data: b"\xff\xfe\x80" + data),
    "UTF-16": _rewrite(lambda data: data.decode("latin-1").encode("utf-16")),
    "zeros": _rewrite(lambda data: b"\0" * len(data)),
    "deep": _rewrite(lambda data: DEEP.encode()),
    "a list": _rewrite(lambda data: b"[1, 2]"),
    "a number of 5000 digits": _rewrite(lambda data: b'{"a": ' + b"9" * 5000 + b"}"),
    "a folder": _instead(Path.mkdir),
    "a pipe": _instead(os.mkfifo),
    "a link to itself": _instead(lambda file: file.symlink_to(file.name)),
    "a link to /dev/zero": _instead(lambda file: file.symlink_to("/dev/zero")),
    "missing": _instead(lambda file: None),
}
