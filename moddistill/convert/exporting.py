"""Export of a model folder: weights, tokenizer, processor and chat template for `transformers`."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from moddistill.convert.companions import TRANSFORMERS_VERSION, write_companions
from moddistill.convert.cut_vocabulary import cut_rows, cut_tables, write_mean_rows
from moddistill.convert.extras import POOLING
from moddistill.convert.families import llava, qwen
from moddistill.convert.finite import FiniteCheck
from moddistill.convert.jinja_template import read_chat_template
from moddistill.convert.resolve import as_model_folder
from moddistill.convert.rules import MappedTensor, Rules, mapped_tensors, prefixed
from moddistill.convert.source_settings import check_generation, check_processor
from moddistill.convert.uniform import uniform_config, uniform_tensors, zero_routers
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.errors import invalid, not_one_of
from moddistill.models.vlm import ModelConfig
from moddistill.storage.atomic_dir import write_folder
from moddistill.storage.json_file import write_json
from moddistill.storage.model_folder import read_model_config, read_source
from moddistill.storage.orbax_layout import Reader
from moddistill.storage.safetensors import read_safetensors, write
from moddistill.storage.shards import create_shards
from moddistill.storage.tensor import DTYPES, Tensor, TensorSpec

LOG = logging.getLogger("moddistill")
_VOCABULARIES = ("cut", "padded")
_DECODER, _HEAD, _TOWER, _ = llava.PUBLISHED_PREFIXES
_DTYPES = {"float32": DTYPES["F32"], "bfloat16": DTYPES["BF16"], "float16": DTYPES["F16"]}


def export_model(
    model: Path,
    out: Path,
    *,
    max_shard_size: int,
    dtype: str = "",
    vocabulary: str = "cut",
    uniform: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a Hugging Face folder from a model folder and returns its config.

    Dense models become `LlavaForConditionalGeneration` with Qwen2 or Qwen3, sparse ones with
    `qwen2_moe` or `qwen3_moe`; a model without a vision tower becomes the language model. What the
    export changes against its source is logged.

    Args:
      max_shard_size: bytes of a weight file.
      dtype: of all weights; as stored if empty.
      vocabulary: `cut` drops embedding rows that are no tokens, see `cut_vocabulary`; `padded` does
        not.
      uniform: whether dense layers are written as equal experts, see `uniform`.

    Raises:
      UserError: no class of `transformers` computes the model, or it cannot be written so.
    """
    original, model = model, as_model_folder(model)
    stored = read_model_config(model)
    tokenizer = load_tokenizer(str(model))
    config, mapped = _layout(
        stored, exported_tensors(stored, model), tokenizer, vocabulary, uniform
    )
    reader = Reader(model / "params")
    reader.check(stored)
    pooling = _pooling(model)
    planned = _plan(config, mapped, reader, dtype)
    planned += [TensorSpec(name, _dtype(dtype, x.dtype), x.shape) for name, x in pooling.items()]
    imported = _imported(model)
    fields = _fields(config, planned)
    if pooling:
        fields["vision_config"]["vision_use_head"] = True
    with write_folder(out, "export", overwrite, inputs=(original, model)) as tmp_dir:
        # Files get their full size first, so that a full disk is found before the conversion.
        tensors = create_shards(tmp_dir, sorted(planned, key=_layer_order), max_shard_size)
        _write_weights(mapped, tensors, reader)
        rows = write_mean_rows(mapped, tensors, config) if vocabulary == "cut" else []
        for name, tensor in pooling.items():
            write(tensors[name], tensor.read(), f"{model / POOLING}: {name}")
        write_json(tmp_dir / "config.json", fields)
        template = read_chat_template(model)
        replaced = write_companions(tmp_dir, config, tokenizer, template, imported)
    changes = _changes(stored, config, dtype, rows) + replaced
    LOG.info("changed against %s: %s", original, ", ".join(changes) or "nothing")
    return fields


def _layout(
    config: ModelConfig,
    mapped: list[MappedTensor],
    tokenizer: Tokenizer,
    vocabulary: str,
    uniform: bool,
) -> tuple[ModelConfig, list[MappedTensor]]:
    """Returns the architecture to write and its tensors."""
    if vocabulary not in _VOCABULARIES:
        raise not_one_of("--vocabulary", vocabulary, _VOCABULARIES)
    if uniform:
        config = uniform_config(config)
        mapped = uniform_tensors(mapped, config.decoder)
    if vocabulary == "cut":
        config = cut_rows(config, tokenizer)
        mapped = cut_tables(mapped, config.decoder.vocab_size)
    return config, mapped


def _plan(
    config: ModelConfig, mapped: Sequence[MappedTensor], reader: Reader, dtype: str
) -> list[TensorSpec]:
    """Returns the tensors to write: those with a parameter, then those that stay zero."""
    planned = [
        TensorSpec(tensor.name, _dtype(dtype, reader.dtype(tensor.slot.path)), tensor.shape)
        for tensor in mapped
    ]
    by_name = {tensor.name: tensor for tensor in planned}
    routers = [
        dataclasses.replace(by_name[like], name=name)
        for name, like in zero_routers(mapped, config.decoder).items()
    ]
    return planned + routers + _shared_expert(config, planned)


def _fields(config: ModelConfig, planned: Sequence[TensorSpec]) -> dict[str, Any]:
    """Returns the content of `config.json`."""
    dtype = _common_dtype(planned)
    # `torch_dtype` is the name in releases before 5.
    fields = _hf_config(config) | {"dtype": dtype, "torch_dtype": dtype} | TRANSFORMERS_VERSION
    if config.context:
        fields.get("text_config", fields)["max_position_embeddings"] = config.context
    return fields


def _changes(
    stored: ModelConfig, written: ModelConfig, dtype: str, rows: Sequence[int]
) -> list[str]:
    """Returns what an export changes of the weights."""
    before, after = stored.decoder, written.decoder
    changes = [f"all weights as {dtype}"] if dtype else []
    if before.vocab_size != after.vocab_size:
        changes.append(f"vocabulary {before.vocab_size} -> {after.vocab_size} rows")
    if rows:
        changes.append(f"head row {', '.join(map(str, rows)):.80} -> mean of the tokens' rows")
    if before.moe_layers != after.moe_layers:
        dense = sorted(set(after.moe_layers) - set(before.moe_layers))
        changes.append(f"dense layers {dense} -> {after.moe.num_experts} equal experts")
    return changes


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
    check_processor(
        imported.get("processor", {}), f"{model / 'model.json'}: source.imported.processor"
    )
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
