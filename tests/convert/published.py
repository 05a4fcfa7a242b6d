"""Folders of published LLaVAs: their own configs, names and dtypes, with random weights or none.

`hub/` has files as they are on the hub, byte for byte as far as their published sizes can tell.
`write` makes a small model of the same fields, `write_hollow` weight files of the real size, whose
bytes are holes.
"""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import LlavaConfig, LlavaForConditionalGeneration

from moddistill.data.tokenizer import Tokenizer
from tests import torch_or_skip as torch
from tests.convert.hf_folders import random_model

INTERLEAVE_7B = "llava-hf/llava-interleave-qwen-7b-hf"
INTERLEAVE_HALF_B = "llava-hf/llava-interleave-qwen-0.5b-hf"
LONG_LLAVA = "aws-prototyping/long-llava-qwen2-7b"

HUB = Path(__file__).parent / "hub"
CONFIGS = {
    name: json.loads((HUB / name / "config.json").read_text())
    for name in (INTERLEAVE_7B, INTERLEAVE_HALF_B, LONG_LLAVA)
}
# Of language model and tower; the sizes of the files say that long-llava's differ. Its 16 bits are
# float16 here, so that both kinds are read.
DTYPES = {
    INTERLEAVE_7B: ("bfloat16", "bfloat16"),
    INTERLEAVE_HALF_B: ("bfloat16", "bfloat16"),
    LONG_LLAVA: ("float16", "float32"),
}
SHARDS = {INTERLEAVE_7B: 4, INTERLEAVE_HALF_B: 1, LONG_LLAVA: 4}

# Sizes of the small models. Like the published 384, 30 pixels are no multiple of the patch size.
_SMALL = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
SMALL = {
    INTERLEAVE_7B: _SMALL | {"hidden_size": 32, "num_hidden_layers": 2},
    INTERLEAVE_HALF_B: _SMALL | {"hidden_size": 16, "num_hidden_layers": 4},
    LONG_LLAVA: _SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2},
}
SMALL_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
}

# Where each part is in a state of `transformers` 5, and in the published files.
_SPELLING = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
_TYPES = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


def small_config(name: str) -> dict:
    """Returns the published config with smaller sizes."""
    config = copy.deepcopy(CONFIGS[name])
    config["text_config"] |= SMALL[name]
    config["vision_config"] |= SMALL_TOWER
    config["vision_config"]["image_size"] = 28 if "clip" in str(config) else 30
    return config


def write(folder: Path, name: str, tokenizer: Tokenizer, seed: int = 0) -> Path:
    """A folder of a small model with random weights, as if it came from the hub."""
    config = small_config(name)
    fields = LlavaConfig(**copy.deepcopy(config))
    model = random_model(LlavaForConditionalGeneration, fields, seed)
    return _write_folder(folder, name, config, _published(model, name), tokenizer)


def write_hollow(folder: Path, name: str, tokenizer: Tokenizer) -> Path:
    """A folder of the published size: headers of all weight files, and holes for their bytes."""
    config = CONFIGS[name]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(**copy.deepcopy(config)))
    return _write_folder(folder, name, config, _published(model, name), tokenizer)


def _write_folder(
    folder: Path, name: str, config: dict, tensors: dict[str, Any], tokenizer: Tokenizer
) -> Path:
    folder.mkdir(parents=True)
    files = _shards(tensors, SHARDS[name])
    for file, keys in files.items():
        _write_file(folder / file, {key: tensors[key] for key in keys})
    if len(files) > 1:
        places = {key: file for file, keys in files.items() for key in keys}
        size = {"total_size": sum(x.nbytes for x in tensors.values())}
        index = {"metadata": size, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_companions(folder, name, config, tokenizer)
    return folder


def _write_file(file: Path, tensors: dict[str, Any]) -> None:
    """Safetensors; of tensors without storage, a hole of their size."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype = _TYPES[str(tensor.dtype)]
        header[key] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            if not tensor.is_meta:
                stream.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        stream.truncate(8 + len(text) + end)


def _published(model: LlavaForConditionalGeneration, name: str) -> dict[str, Any]:
    """The state under the published names and in the published dtypes; no tied head."""
    language, tower = DTYPES[name]
    found = {}
    for key, tensor in model.state_dict().items():
        [(old, new)] = [pair for pair in _SPELLING.items() if key.startswith(pair[0])]
        dtype = tower if "vision_tower" in old else language
        found[new + key.removeprefix(old)] = tensor.to(getattr(torch, dtype))
    if CONFIGS[name]["text_config"].get("tie_word_embeddings"):
        del found["language_model.lm_head.weight"]
    return found


def _shards(tensors: dict[str, Any], count: int) -> dict[str, list[str]]:
    """File names and the names of their tensors, in order, of about the same number of bytes."""
    total = sum(x.nbytes for x in tensors.values())
    shards, size = [[] for _ in range(count)], 0
    for key, tensor in tensors.items():
        shards[size * count // total].append(key)
        size += tensor.nbytes
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return dict(zip(names if count > 1 else ["model.safetensors"], shards, strict=True))


def _write_companions(folder: Path, name: str, config: dict, tokenizer: Tokenizer) -> None:
    """Config, processor, chat template and tokenizer; images of the size that the config has."""
    _write_json(folder / "config.json", config)
    size = config["vision_config"]["image_size"]
    pixels = json.loads((HUB / name / "preprocessor_config.json").read_text())
    for field in {"size", "crop_size"} & set(pixels):
        pixels[field] = dict.fromkeys(pixels[field], size)
    _write_json(folder / "preprocessor_config.json", pixels)
    template = HUB / name / "chat_template.json"
    (folder / template.name).write_bytes(template.read_bytes())
    tokenizer.save(str(folder))


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
