"""A model folder out: weights, tokenizer, processor and chat template for `transformers`."""

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moddistill.convert.chat_template import FILE, chat_template, read_chat_template, stop_token
from moddistill.convert.extras import POOLING
from moddistill.convert.families import llava, qwen
from moddistill.convert.finite import FiniteCheck
from moddistill.convert.resolve import as_model_folder
from moddistill.convert.rules import MappedTensor, Rules, mapped_tensors, prefixed
from moddistill.convert.source_settings import check_generation, merge_generation
from moddistill.data.conversation import end_token
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.errors import UserError
from moddistill.models.vlm import ModelConfig
from moddistill.models.vocabulary import token_mask
from moddistill.storage.atomic_dir import write_folder
from moddistill.storage.model_folder import preprocessor_config, read_model_config, read_source
from moddistill.storage.orbax_layout import Reader
from moddistill.storage.safetensors import read_safetensors, write
from moddistill.storage.shards import create_shards
from moddistill.storage.tensor import DTYPES, Tensor, TensorSpec

LOG = logging.getLogger("moddistill")
# Without it, `transformers` warns of a tokenizer bug of earlier releases.
_WRITTEN_FOR = {"transformers_version": version("transformers")}
_DECODER, _HEAD, _TOWER, _ = llava.PUBLISHED_PREFIXES
_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}


def export_model(
    model: Path, out: Path, *, max_shard_size: int, dtype: str = "", overwrite: bool = False
) -> dict[str, Any]:
    """Writes a Hugging Face folder from a model folder and returns its config.

    Dense models become `LlavaForConditionalGeneration` with Qwen2 or Qwen3, sparse ones with
    `qwen2_moe` or `qwen3_moe`; without a tower the language model alone.

    Args:
      max_shard_size: bytes of a weight file.
      dtype: of all weights; as they are stored if empty.

    Raises:
      UserError: for a model that no class of `transformers` computes.
    """
    given, model = model, as_model_folder(model)
    config = read_model_config(model)
    found = exported_tensors(config, model)
    reader = Reader(model / "params")
    reader.check(config)
    stored = {path: reader.dtype(path) for path in {piece.slot.path for piece in found}}
    planned = [
        TensorSpec(piece.name, _dtype(dtype, stored[piece.slot.path]), piece.shape)
        for piece in found
    ]
    pooling = _pooling(model)
    planned += _shared_expert(config, planned)
    planned += [TensorSpec(name, _dtype(dtype, x.dtype), x.shape) for name, x in pooling.items()]
    fields = _hf_config(config) | {"dtype": _common_dtype(planned)} | _WRITTEN_FOR
    if context := _imported(model).get("context"):
        fields.get("text_config", fields)["max_position_embeddings"] = context
    fields["torch_dtype"] = fields["dtype"]  # where releases before 5 look for it
    if pooling:
        fields["vision_config"]["vision_use_head"] = True
    with write_folder(out, "export", overwrite, inputs=(given, model)) as tmp_dir:
        places = create_shards(tmp_dir, sorted(planned, key=_layer_order), max_shard_size)
        _write_weights(found, places, reader)
        for name, tensor in pooling.items():
            write(places[name], tensor.read(), f"{model / POOLING}: {name}")
        _write_json(tmp_dir / "config.json", fields)
        _write_companions(tmp_dir, config, model)
    return fields


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    """The content of `config.json`, without dtypes."""
    if config.vision is None:
        return qwen.text_config(config.decoder)
    return llava.hf_config(config)


def _check_exportable(config: ModelConfig) -> None:
    moe = config.decoder.moe
    if moe is not None and moe.residual:
        raise UserError("moe.residual is true; no class of transformers has such experts")
    if moe is not None and moe.dispatch != "dropless":
        raise UserError(
            f"moe.dispatch is {moe.dispatch!r}; transformers drops no token, so answers would "
            "differ; accepted: 'dropless'"
        )


def _rules(config: ModelConfig) -> Rules:
    if config.vision is None:
        return (*prefixed(qwen.RULES + qwen.EXPERTS, "model."), *qwen.HEAD)
    return llava.checkpoint_rules(llava.PUBLISHED_PREFIXES, llava.tower_family(config.vision))


def exported_tensors(config: ModelConfig, model: Path) -> list[MappedTensor]:
    """All arrays of a model folder's export; a tied head too, if the source had stored one.

    Raises:
      UserError: for a model that no class of `transformers` computes.
    """
    _check_exportable(config)
    found = mapped_tensors(config, _rules(config))
    _hf_config(config)
    if not _imported(model).get("stored_head"):
        return found
    head = ("" if config.vision is None else _HEAD) + "lm_head.weight"
    [table] = [piece for piece in found if piece.slot.path == "decoder/embedding"]
    return [*found, dataclasses.replace(table, name=head)]


def _imported(model: Path) -> dict[str, Any]:
    """What an import recorded; empty once a stage has trained the model."""
    imported = read_source(model).get("imported", {})
    field = "source.imported.generation.{}".format
    check_generation(imported.get("generation", {}), str(model / "model.json"), field)
    return imported


def _pooling(model: Path) -> dict[str, Tensor]:
    """The pooling head that came with an imported SigLIP."""
    if not (model / POOLING).is_file():
        return {}
    return {f"{_TOWER}head.{name}": x for name, x in read_safetensors(model / POOLING).items()}


def _dtype(wanted: str, stored: np.dtype) -> np.dtype:
    if wanted and wanted not in _DTYPES:
        raise UserError(f"dtype is {wanted!r}; accepted: {', '.join(_DTYPES)}")
    return _DTYPES[wanted] if wanted else stored


def _shared_expert(config: ModelConfig, planned: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The zero expert of Qwen2-MoE, of the dtype that the others have."""
    prefix = "model." if config.vision is None else _DECODER
    shapes = qwen.shared_expert(config.decoder)
    dtypes = [tensor.dtype for tensor in planned if ".experts." in tensor.name]
    return [TensorSpec(prefix + name, dtypes[0], shape) for name, shape in shapes.items()]


def _common_dtype(tensors: Sequence[TensorSpec]) -> str:
    """The dtype in which no weight loses anything."""
    found = {tensor.dtype.name for tensor in tensors}
    return found.pop() if len(found) == 1 else "float32"


def _layer_order(tensor: TensorSpec) -> list[Any]:
    """Names with their numbers compared as numbers."""
    return [(not x.isdigit(), int(x) if x.isdigit() else x) for x in re.split(r"[.]", tensor.name)]


def _write_weights(
    found: Sequence[MappedTensor], places: dict[str, Tensor], reader: Reader
) -> None:
    """Array by array; tensors that are not filled stay zero."""
    finite = FiniteCheck(str(reader.folder))
    total = sum(place.nbytes for place in places.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", mininterval=0.5) as bar:
        for piece in sorted(found, key=lambda piece: piece.slot):
            whole = places[piece.name]
            for index, rows in piece.parts(whole.dtype.itemsize):
                place = whole if rows == slice(None) else whole.rows(rows)
                array = reader.read(piece.slot.path, index)
                finite.add(piece.name, array)
                outward = piece.transform.outward(array, place.shape)
                write(place, outward, f"{reader.folder.parent}: {piece.name}")
                bar.update(place.nbytes)
    finite.close()


def _write_companions(folder: Path, config: ModelConfig, model: Path) -> None:
    """Tokenizer, chat template, generation settings and, with a tower, the processor."""
    tokenizer = load_tokenizer(str(model))
    tokenizer.save(str(folder))
    if config.vision is None and tokenizer.image_id >= config.decoder.vocab_size:
        _remove_token(folder / "tokenizer.json", IMAGE)
    end = stop_token(config.template)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"eos_token": end}
    _write_json(path, settings)
    template = read_chat_template(model) or chat_template(config.template)
    (folder / FILE).write_text(template, encoding="utf-8")
    # Rows without a token, and that of `<image>`, which `transformers` would generate.
    masked = np.flatnonzero(~token_mask(config.decoder.real_ids, config.decoder.vocab_size))
    generation = {
        "eos_token_id": _end_ids(tokenizer, config.template),
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
    }
    if len(masked):
        generation["suppress_tokens"] = masked.tolist()
    generation = merge_generation(
        generation, _imported(model).get("generation", {}), config.decoder.vocab_size
    )
    _write_json(folder / "generation_config.json", generation | _WRITTEN_FOR)
    if config.vision is not None:
        _write_processor(folder, config)
    if replaced := _imported(model).get("replaced"):
        LOG.warning("the image processor differs from that of the source: %s", ", ".join(replaced))


def _remove_token(file: Path, token: str) -> None:
    """Removes a token from a `tokenizer.json`: `generate` fails on an id without a row."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["added_tokens"] = [x for x in fields["added_tokens"] if x["content"] != token]
    vocabulary = fields["model"]["vocab"]
    if isinstance(vocabulary, dict):  # a list, of another kind of model, has no ids
        vocabulary.pop(token, None)
    _write_json(file, fields)


def _end_ids(tokenizer: Tokenizer, template: str) -> int | list[int]:
    """Ids at any of which generation ends; a format that ends in text has the general one too."""
    general = tokenizer.special(stop_token(template))
    end = end_token(template)
    return [general, *tokenizer.encode(end)] if end.isspace() else general


def _write_processor(folder: Path, config: ModelConfig) -> None:
    vision = config.vision
    pixels = preprocessor_config(vision.image_size, vision.mean, vision.std)
    _write_json(folder / "preprocessor_config.json", pixels)
    settings = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": "default" if vision.class_token else "full",
    }
    _write_json(folder / "processor_config.json", settings)


def _write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    file.write_text(text + "\n", encoding="utf-8")
