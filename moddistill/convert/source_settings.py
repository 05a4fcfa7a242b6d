"""Generation and image settings of a source: what an export preserves and what it replaces."""

import json
import logging
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moddistill.convert.hub import sub_config
from moddistill.errors import UserError
from moddistill.models.limits import Spell
from moddistill.models.vision import VisionConfig
from moddistill.ranges import Range
from moddistill.storage.json_file import read_json
from moddistill.storage.model_folder import preprocessor_config

LOG = logging.getLogger("moddistill")
GENERATION = "generation_config.json"
# Sampling settings that `transformers` refuses to load with values outside of these ranges.
_INTEGERS = {"max_new_tokens": Range(ge=1), "max_length": Range(ge=1), "top_k": Range(ge=0)}
_NUMBERS = {
    "temperature": Range(ge=0),
    "top_p": Range(ge=0, le=1),
    "min_p": Range(ge=0, le=1),
    "repetition_penalty": Range(gt=0),
}
_MAX_DEPTH = 20  # of lists and objects in a setting; published ones have two
# Set by the export itself, from the tokenizer, the template and the padded vocabulary.
_COMPUTED = ("eos_token_id", "pad_token_id", "suppress_tokens")


def read_generation(folder: Path) -> dict[str, Any]:
    """Reads the generation settings of a Hugging Face folder, without metadata; empty if none.

    Raises:
      UserError: the file is no JSON object; or as `check_generation`.
    """
    if not os.path.lexists(folder / GENERATION):
        return {}
    fields = {
        name: value
        for name, value in read_json(folder / GENERATION).items()
        if not name.startswith("_") and name != "transformers_version"
    }
    check_generation(fields, str(folder / GENERATION))
    return fields


def check_generation(fields: Mapping[str, Any], origin: str, spell: Spell = str) -> None:
    """Raises UserError for settings that are not valid JSON, and for invalid token ids.

    Args:
      spell: maps a name in `fields` to the field in `origin`.
    """
    for name, value in fields.items():
        expected = ""
        if _has_ids(name) and not all(type(x) is int and x >= 0 for x in _as_list(value)):
            expected = "a token id or a list of them, whole numbers from 0"
        elif name in _INTEGERS and not (type(value) is int and value in _INTEGERS[name]):
            expected = "" if value is None else f"an integer {_INTEGERS[name]}"
        elif name in _NUMBERS and not (type(value) in (int, float) and value in _NUMBERS[name]):
            expected = "" if value is None else f"a number {_NUMBERS[name]}"
        elif not _is_writable({name: value}):
            expected = f"finite numbers and text in UTF-8, nested at most {_MAX_DEPTH} times"
        if expected:
            field = ascii(spell(name))[1:-1]
            # reprlib, since the repr of a deeply nested value exceeds the recursion limit.
            raise UserError(f"{origin}: {field}: expected {expected}, got {reprlib.repr(value)}")


def _is_writable(value: Any) -> bool:
    """Returns True if a parsed value can be written as valid JSON."""
    if not _is_nested_at_most(_MAX_DEPTH, value):
        return False
    try:
        # Python parses `NaN`, `1e999` and lone surrogates without an error.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return False
    return True


def _is_nested_at_most(levels: int, value: Any) -> bool:
    if not isinstance(value, dict | list):
        return True
    children = value.values() if isinstance(value, dict) else value
    return levels >= 0 and all(_is_nested_at_most(levels - 1, child) for child in children)


def merge_generation(
    computed: Mapping[str, Any], source: Mapping[str, Any], rows: int
) -> tuple[dict[str, Any], list[str]]:
    """Merges the generation settings of a source into those computed by the export.

    Sampling settings and lengths are those of the source. Its end-of-sequence ids are used if they
    include the computed ones; suppressed tokens are merged. Ids without an embedding row are
    dropped.

    Args:
      rows: number of rows of the embedding.

    Returns:
      The merged settings, and `name old -> new` of each that is replaced.
    """
    valid = {name: _with_row(x, rows) if _has_ids(name) else x for name, x in source.items()}
    merged = {**computed, **{name: x for name, x in valid.items() if name not in _COMPUTED}}
    if set(_as_list(computed["eos_token_id"])) <= set(_as_list(valid.get("eos_token_id"))):
        merged["eos_token_id"] = valid["eos_token_id"]
    if suppressed := set(_as_list(valid.get("suppress_tokens"))):
        merged["suppress_tokens"] = sorted(suppressed.union(computed.get("suppress_tokens", ())))
    replaced = [
        f"{name} {value!r:.80} -> {merged.get(name)!r:.80}"
        for name, value in source.items()
        if not _is_preserved(name, value, merged.get(name))
    ]
    return merged, replaced


def _has_ids(name: str) -> bool:
    """Returns True for token ids, such as `eos_token_id` or `begin_suppress_tokens`."""
    return name.endswith(("token_id", "suppress_tokens"))


def _as_list(value: Any) -> list[Any]:
    """Returns the values of a setting that is a value, a list or None."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _with_row(value: Any, rows: int) -> Any:
    """Removes token ids without an embedding row; None if none is left."""
    valid = [x for x in _as_list(value) if x < rows]
    return (valid if isinstance(value, list) else valid[0]) if valid else None


def _is_preserved(name: str, before: Any, after: Any) -> bool:
    if name == "suppress_tokens":
        return set(_as_list(before)) <= set(_as_list(after))
    # Null is the default, which the export may replace.
    return before in (None, after)


def image_processor(folder: Path) -> dict[str, Any]:
    """Reads the image processor of a folder, a file or part of one; empty if none."""
    processor: dict[str, Any] = {}
    for file in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if os.path.lexists(file):
            fields = read_json(file)
            nested = "image_processor" in fields
            processor |= sub_config(fields, "image_processor", str(file)) if nested else fields
    return processor


def exportable_processor(folder: Path) -> dict[str, Any]:
    """Returns the image processor of a folder; empty if `transformers` would not know its class.

    Raises:
      UserError: settings that are not valid JSON.
    """
    fields = image_processor(folder)
    check_processor(fields, f"{folder}: image processor")
    return fields if isinstance(fields.get("image_processor_type"), str) else {}


def check_processor(fields: Mapping[str, Any], origin: str) -> None:
    """Raises UserError for settings of an image processor that are not valid JSON."""
    for name, value in fields.items():
        if not _is_writable({name: value}):
            expected = f"finite numbers and text in UTF-8, nested at most {_MAX_DEPTH} times"
            field = ascii(name)[1:-1]
            raise UserError(f"{origin}: {field}: expected {expected}, got {reprlib.repr(value)}")


def replaced_image_settings(folder: Path, vision: VisionConfig) -> list[str]:
    """Returns the settings of the image processor that training and the export replace.

    Returns:
      `name old -> new` for each; empty if the source pads images to squares of the same size, or
      has no settings.
    """
    written = preprocessor_config(vision.image_size, vision.mean, vision.std)
    del written["do_convert_rgb"]  # not a setting of all processors
    source = image_processor(folder)
    # The suffix is the backend: `CLIPImageProcessorFast`.
    if str(source.get("image_processor_type")).startswith(written["image_processor_type"]):
        del written["image_processor_type"]
    differs = [name for name, value in written.items() if source.get(name) != value]
    if not written.keys() & source.keys():
        differs = []
    replaced = [f"{name} {source.get(name)!r} -> {written[name]!r}" for name in differs]
    # Checkpoints of LLaVA's code have this setting in the config of the model.
    aspect = read_json(folder / "config.json").get("image_aspect_ratio", "pad")
    return replaced + ([f"image_aspect_ratio {aspect!r} -> 'pad'"] if aspect != "pad" else [])
