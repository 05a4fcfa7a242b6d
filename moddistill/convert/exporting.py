"""Export of a model folder: weights, tokenizer, processor and chat template for `transformers`."""

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

from moddistill.convert.extras import POOLING
from moddistill.convert.families import llava, qwen
from moddistill.convert.finite import FiniteCheck
from moddistill.convert.jinja_template import FILE, chat_template, read_chat_template, stop_token
from moddistill.convert.resolve import as_model_folder
from moddistill.convert.rules import MappedTensor, Rules, mapped_tensors, prefixed
from moddistill.convert.source_settings import check_generation, merge_generation
from moddistill.data.chat_template import end_token
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.errors import invalid, not_one_of
from moddistill.models.vlm import ModelConfig
from moddistill.models.vocabulary import token_mask
from moddistill.storage.atomic_dir import write_folder
from moddistill.storage.json_file import write_json
from moddistill.storage.model_folder import preprocessor_config, read_model_config, read_source
from moddistill.storage.orbax_layout import Reader
from moddistill.storage.safetensors import read_safetensors, write
from moddistill.storage.shards import create_shards
from moddistill.storage.tensor import DTYPES, Tensor, TensorSpec

LOG = logging.getLogger("moddistill")
# Without this field, `transformers` warns of a tokenizer bug of earlier releases.
_TRANSFORMERS_VERSION = {"transformers_version": version("transformers")}
_DECODER, _HEAD, _TOWER, _ = llava.PUBLISHED_PREFIXES
_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}


def export_model(
    model: Path, out: Path, *, max_shard_size: int, dtype: str = "", overwrite: bool = False
) -> dict[str, Any]:
    """Writes a Hugging Face folder from a model folder and returns its config.

    Dense models become `LlavaForConditionalGeneration` with Qwen2 or Qwen3, sparse ones with
    `qwen2_moe` or `qwen3_moe`; a model without a vision tower becomes the language model.

    Args:
      max_shard_size: bytes of a weight file.
      dtype: of all weights; as stored if empty.

    Raises:
      UserError: no class of `transformers` computes the model.
    """
    original, model = model, as_model_folder(model)
    config = read_model_config(model)
    mapped = exported_tensors(config, model)
    reader = Reader(model / "params")
    reader.check(config)
    stored = {path: reader.dtype(path) for path in {tensor.slot.path for tensor in mapped}}
    planned = [
        TensorSpec(tensor.name, _dtype(dtype, stored[tensor.slot.path]), tensor.shape)
        for tensor in mapped
    ]
    pooling = _pooling(model)
    planned += _shared_expert(config, planned)
    planned += [TensorSpec(name, _dtype(dtype, x.dtype), x.shape) for name, x in pooling.items()]
    fields = _hf_config(config) | {"dtype": _common_dtype(planned)} | _TRANSFORMERS_VERSION
    if config.context:
        fields.get("text_config", fields)["max_position_embeddings"] = config.context
    fields["torch_dtype"] = fields["dtype"]  # the name in releases before 5
    if pooling:
        fields["vision_config"]["vision_use_head"] = True
    with write_folder(out, "export", overwrite, inputs=(original, model)) as tmp_dir:
        # Files get their full size first, so that a full disk is found before the conversion.
        tensors = create_shards(tmp_dir, sorted(planned, key=_layer_order), max_shard_size)
        _write_weights(mapped, tensors, reader)
        for name, tensor in pooling.items():
            write(tensors[name], tensor.read(), f"{model / POOLING}: {name}")
        write_json(tmp_dir / "config.json", fields)
        _write_companions(tmp_dir, config, model)
    return fields


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the content of `config.json`, without dtypes."""
    if config.vision is None:
        return qwen.text_config(config.decoder)
    return llava.hf_config(config)


def _check_exportable(config: ModelConfig) -> None:
    moe = config.decoder.moe
    if moe is not None and moe.residual:
        raise invalid("moe.residual", moe.residual, "false, as transformers has no such experts")
    if moe is not None and moe.dispatch != "dropless":
        expected = "'dropless', as transformers drops no token and answers would differ"
        raise invalid("moe.dispatch", moe.dispatch, expected)


def _rules(config: ModelConfig) -> Rules:
    if config.vision is None:
        return (*prefixed(qwen.RULES + qwen.EXPERTS, "model."), *qwen.HEAD)
    return llava.checkpoint_rules(llava.PUBLISHED_PREFIXES, llava.tower_family(config.vision))


def exported_tensors(config: ModelConfig, model: Path) -> list[MappedTensor]:
    """Returns all tensors of a model folder's export.

    A tied head is the embedding under a second name; it is exported if the source stored it.

    Raises:
      UserError: no class of `transformers` computes the model.
    """
    _check_exportable(config)
    mapped = mapped_tensors(config, _rules(config))
    _hf_config(config)  # raises for a projector or an image token that LLaVA does not have
    if not _imported(model).get("stored_head"):
        return mapped
    head = ("" if config.vision is None else _HEAD) + "lm_head.weight"
    [table] = [tensor for tensor in mapped if tensor.slot.path == "decoder/embedding"]
    return [*mapped, dataclasses.replace(table, name=head)]


def _imported(model: Path) -> dict[str, Any]:
    """Returns the record of the import; empty after a stage has trained the model."""
    imported = read_source(model).get("imported", {})
    field = "source.imported.generation.{}".format
    check_generation(imported.get("generation", {}), str(model / "model.json"), field)
    return imported


def _pooling(model: Path) -> dict[str, Tensor]:
    """Returns the pooling head of an imported SigLIP model."""
    if not (model / POOLING).is_file():
        return {}
    return {f"{_TOWER}head.{name}": x for name, x in read_safetensors(model / POOLING).items()}


def _dtype(name: str, stored: np.dtype) -> np.dtype:
    if name and name not in _DTYPES:
        raise not_one_of("dtype", name, _DTYPES)
    return _DTYPES[name] if name else stored


def _shared_expert(config: ModelConfig, planned: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Returns the zero shared experts of Qwen2-MoE, in the dtype of the other experts."""
    prefix = "model." if config.vision is None else _DECODER
    shapes = qwen.shared_expert(config.decoder)
    # `create_shards` fills files with zeros, so their weights need not be written.
    dtypes = [tensor.dtype for tensor in planned if ".experts." in tensor.name]
    return [TensorSpec(prefix + name, dtypes[0], shape) for name, shape in shapes.items()]


def _common_dtype(tensors: Sequence[TensorSpec]) -> str:
    """Returns the dtype of all tensors, or float32, which represents all others exactly."""
    names = {tensor.dtype.name for tensor in tensors}
    return names.pop() if len(names) == 1 else "float32"


def _layer_order(tensor: TensorSpec) -> list[Any]:
    """Returns a sort key in which numbers within names compare as numbers."""
    return [(not x.isdigit(), int(x) if x.isdigit() else x) for x in re.split(r"[.]", tensor.name)]


def _write_weights(
    mapped: Sequence[MappedTensor], tensors: dict[str, Tensor], reader: Reader
) -> None:
    """Converts and writes the parameters block by block, into files created with zeros.

    Tensors without a parameter, the shared experts, stay zero.
    """
    finite = FiniteCheck(str(reader.folder))
    total = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", mininterval=0.5) as bar:
        # In the order of the parameters, so that chunks of a stack are read one after the other.
        for mapped_tensor in sorted(mapped, key=lambda tensor: tensor.slot):
            name, slot, transform = mapped_tensor.name, mapped_tensor.slot, mapped_tensor.transform
            tensor = tensors[name]
            for index, rows in mapped_tensor.blocks(tensor.dtype.itemsize):
                target = tensor if rows == slice(None) else tensor.rows(rows)
                array = reader.read(slot.path, index)
                finite.add(name, array)
                converted = transform.to_tensor(array, target.shape)
                write(target, converted, f"{reader.folder.parent}: {name}")
                bar.update(target.nbytes)
    finite.close()


def _write_companions(folder: Path, config: ModelConfig, model: Path) -> None:
    """Writes tokenizer, chat template, generation settings and, with a tower, the processor."""
    tokenizer = load_tokenizer(str(model))
    tokenizer.save(str(folder))
    if config.vision is None and tokenizer.image_id >= config.decoder.vocab_size:
        _remove_token(folder / "tokenizer.json", IMAGE)
    end = stop_token(config.template)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"eos_token": end}
    write_json(path, settings)
    template = read_chat_template(model) or chat_template(config.template)
    (folder / FILE).write_text(template, encoding="utf-8")
    # Rows of padding and of `<image>`, which `transformers` could generate otherwise.
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
    write_json(folder / "generation_config.json", generation | _TRANSFORMERS_VERSION)
    if config.vision is not None:
        _write_processor(folder, config)
    if replaced := _imported(model).get("replaced"):
        LOG.warning("the image processor differs from that of the source: %s", ", ".join(replaced))


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


def _write_processor(folder: Path, config: ModelConfig) -> None:
    vision = config.vision
    pixels = preprocessor_config(vision.image_size, vision.mean, vision.std)
    write_json(folder / "preprocessor_config.json", pixels)
    settings = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": "default" if vision.class_token else "full",
    }
    write_json(folder / "processor_config.json", settings)
