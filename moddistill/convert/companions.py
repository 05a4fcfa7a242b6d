"""Files of an export next to its weights: tokenizer, chat template, settings, image processor."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moddistill.convert.jinja_template import FILE, chat_template, stop_token
from moddistill.convert.source_settings import GENERATION, merge_generation
from moddistill.data.chat_template import end_token
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig
from moddistill.models.vocabulary import token_mask
from moddistill.storage.json_file import write_json
from moddistill.storage.model_folder import preprocessor_config

# Without this field, `transformers` warns of a tokenizer bug of earlier releases.
TRANSFORMERS_VERSION = {"transformers_version": version("transformers")}


def write_companions(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, template: str, imported: dict[str, Any]
) -> list[str]:
    """Writes the files and returns what they change, `name old -> new`, of the source's settings.

    Args:
      config: of the exported weights.
      template: chat template; empty for that of training.
      imported: record of the import, of which settings come back; empty for a trained model.
    """
    tokenizer.save(str(folder))
    if config.vision is None and tokenizer.image_id >= config.decoder.vocab_size:
        _remove_token(folder / "tokenizer.json", IMAGE)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"eos_token": stop_token(config.template)}
    write_json(path, settings)
    (folder / FILE).write_text(template or chat_template(config.template), encoding="utf-8")
    generation, replaced = merge_generation(
        _generation(config, tokenizer), imported.get("generation", {}), config.decoder.vocab_size
    )
    write_json(folder / GENERATION, generation | TRANSFORMERS_VERSION)
    if config.vision is not None:
        _write_processor(folder, config.vision, imported.get("processor", {}))
    return replaced + ([] if imported.get("processor") else imported.get("replaced", []))


def _generation(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns greedy decoding, the end of an answer, and the rows that are no tokens."""
    generation = {
        "eos_token_id": _end_ids(tokenizer, config.template),
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
    }
    masked = np.flatnonzero(~token_mask(config.decoder.real_ids, config.decoder.vocab_size))
    return generation | ({"suppress_tokens": masked.tolist()} if len(masked) else {})


def _remove_token(file: Path, token: str) -> None:
    """Removes a token from `tokenizer.json`, since an id without an embedding row crashes."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["added_tokens"] = [x for x in fields["added_tokens"] if x["content"] != token]
    vocabulary = fields["model"]["vocab"]
    if isinstance(vocabulary, dict):  # a list (of a Unigram model) has no ids
        vocabulary.pop(token, None)
    write_json(file, fields)


def _end_ids(tokenizer: Tokenizer, template: str) -> int | list[int]:
    """Returns the ids that end generation; `plain` ends with text, and has a control token too."""
    control = tokenizer.special(stop_token(template))
    end = end_token(template)
    return [control, *tokenizer.encode(end)] if end.isspace() else control


def _write_processor(folder: Path, vision: VisionConfig, source: dict[str, Any]) -> None:
    pixels = source or preprocessor_config(vision.image_size, vision.mean, vision.std)
    write_json(folder / "preprocessor_config.json", pixels)
    settings = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": "default" if vision.class_token else "full",
    }
    write_json(folder / "processor_config.json", settings)
