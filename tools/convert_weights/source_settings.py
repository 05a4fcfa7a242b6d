"""Generation and image settings of a source: which come back from an export, which are replaced."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moddistill.data.images import preprocessor_config
from moddistill.json_file import read_json
from moddistill.models.vision import VisionConfig
from tools.convert_weights.hub import part_of

LOG = logging.getLogger("moddistill")
GENERATION = "generation_config.json"
# Set by the export itself, from the tokenizer, the template and the padded vocabulary.
_COMPUTED = ("eos_token_id", "pad_token_id", "suppress_tokens")


def read_generation(folder: Path) -> dict[str, Any]:
    """The generation settings of a Hugging Face folder, without its metadata; empty if none.

    Raises:
      ValueError: if the file is no JSON object.
    """
    if not os.path.lexists(folder / GENERATION):
        return {}
    fields = read_json(folder / GENERATION)
    return {
        name: value
        for name, value in fields.items()
        if not name.startswith("_") and name != "transformers_version"
    }


def merge_generation(computed: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """The generation settings of an export whose model was imported with the settings `source`.

    Sampling settings and lengths are those of the source. Its ends of an answer are kept if they
    include the `computed` ones, and its suppressed tokens are added; what is replaced is logged.
    """
    merged = {**computed, **{name: x for name, x in source.items() if name not in _COMPUTED}}
    if _ids(computed["eos_token_id"]) <= _ids(source.get("eos_token_id")):
        merged["eos_token_id"] = source["eos_token_id"]
    if suppressed := _ids(source.get("suppress_tokens")):
        merged["suppress_tokens"] = sorted(suppressed | _ids(computed.get("suppress_tokens")))
    replaced = [
        f"{name} {source[name]!r} -> {merged[name]!r}"
        for name in ("eos_token_id", "pad_token_id")
        if source.get(name) not in (None, merged[name])
    ]
    if replaced:
        LOG.warning("generation settings of the source are replaced: %s", ", ".join(replaced))
    return merged


def _ids(value: Any) -> set[int]:
    """Token ids, of which a setting has one, a list or none; empty for anything else."""
    values = value if isinstance(value, list) else [value]
    return set(values) if all(type(x) is int for x in values) else set()


def image_processor(folder: Path) -> dict[str, Any]:
    """Fields of a folder's image processor, which is a file or a part of one; empty if none."""
    found: dict[str, Any] = {}
    for file in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        if os.path.lexists(file):
            fields = read_json(file)
            nested = "image_processor" in fields
            found |= part_of(fields, "image_processor", str(file)) if nested else fields
    return found


def replaced_image_settings(folder: Path, vision: VisionConfig) -> list[str]:
    """Settings of a whole model's image processor that training and the export replace.

    Returns:
      `name old -> new` for each; empty if the source pads images to squares of the same size too,
      or states nothing.
    """
    written = preprocessor_config(vision.image_size, vision.mean, vision.std)
    del written["do_convert_rgb"]  # of every processor
    source = image_processor(folder)
    # The same processor with another backend has a suffix.
    if str(source.get("image_processor_type")).startswith(written["image_processor_type"]):
        del written["image_processor_type"]
    differs = [name for name, value in written.items() if source.get(name) != value]
    if not written.keys() & source.keys():
        differs = []
    replaced = [f"{name} {source.get(name)!r} -> {written[name]!r}" for name in differs]
    # Checkpoints of the original code state it in the config of the model.
    aspect = read_json(folder / "config.json").get("image_aspect_ratio", "pad")
    return replaced + ([f"image_aspect_ratio {aspect!r} -> 'pad'"] if aspect != "pad" else [])
