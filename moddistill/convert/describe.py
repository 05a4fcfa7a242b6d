"""`inspect`: parameters, dtypes, layer plan, tokenizer and uses of a folder."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moddistill.convert.assignments import assign_tensors
from moddistill.convert.exporting import exported_tensors
from moddistill.convert.hub import local_folder
from moddistill.convert.rules import slots
from moddistill.convert.sources import Source, open_source
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.distributed.sharding import unbox
from moddistill.errors import UserError
from moddistill.models.decoder import DecoderConfig
from moddistill.models.flops import parameter_counts
from moddistill.models.layer_plan import Segment
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.models.vocabulary import num_ids
from moddistill.params import flatten
from moddistill.storage import model_folder
from moddistill.storage.model_folder import read_model_config
from moddistill.storage.orbax_layout import Reader
from moddistill.storage.shards import read_file
from moddistill.storage.tensor import Checkpoint


def describe(name: str) -> dict[str, Any]:
    """Describes a model folder, Hugging Face folder or projector file as a JSON object.

    Raises:
      UserError: `name` is none of these.
    """
    folder = Path(name)
    if (folder / "model.json").is_file():
        return _model_folder(folder)
    if folder.is_file():
        return _file(folder)
    return _hugging_face(local_folder(name))


def _model_folder(folder: Path) -> dict[str, Any]:
    config = read_model_config(folder)
    reader = Reader(folder / "params")
    reader.check(config)
    dtypes: collections.Counter[str] = collections.Counter()
    for path, leaf in flatten(unbox(abstract_params(config))).items():
        dtypes[reader.dtype(path).name] += leaf.size
    return {
        "kind": "model folder",
        "dtypes": dict(dtypes),
        **_sizes(config),
        **_activated(config),
        **_architecture(config),
        "tokenizer": _tokenizer(load_tokenizer(str(folder))),
        **_export_uses(folder, config),
        **_imported(folder),
    }


def _imported(folder: Path) -> dict[str, Any]:
    """Returns the record of the import; a trained model has none."""
    imported = model_folder.read_source(folder).get("imported")
    return {"imported": imported} if imported else {}


def _export_uses(folder: Path, config: ModelConfig) -> dict[str, Any]:
    uses = _uses(config) + (["upcycle"] if config.decoder.moe is None else [])
    try:
        exported_tensors(config, folder)
    except UserError as error:
        return {"uses": uses, "not exported": str(error)}
    return {"uses": [*uses, "export"]}


def _uses(config: ModelConfig) -> list[str]:
    """Returns the uses of a complete model; evaluation needs images."""
    return ["train", "generate"] + (["evaluate"] if config.vision else [])


def _hugging_face(folder: Path) -> dict[str, Any]:
    source = open_source(folder)
    config = _config(source)
    facts = _tensors("Hugging Face folder", source.checkpoint)
    facts |= {"holds": list(source.parts)} | _sizes(config, source.parts)
    # A language model, or one with both vision tower and projector.
    is_complete = source.decoder is not None and (source.vision is None) == (
        source.projector is None
    )
    if is_complete:
        facts |= _activated(config)
    if source.decoder is not None:
        shown = dataclasses.replace(config, vision=source.vision)
        facts |= _architecture(shown) | {"tokenizer": _tokenizer(source.tokenizer)}
    elif source.vision is not None:
        facts["image"] = _image(source.vision)
    try:
        assign_tensors(source, config)
    except UserError as error:
        return facts | {"uses": [], "not imported": str(error).splitlines()}
    if is_complete:
        return facts | {"uses": ["import", *_uses(config)]}
    return facts | {"uses": ["import with --vision" if source.decoder else "import as --vision"]}


def _config(source: Source) -> ModelConfig:
    """Returns an architecture with the source's parts, and minimal ones for the missing parts."""
    vision = source.vision
    if vision is None and source.projector is not None:
        # The torch weight of a projector is [outputs, inputs]; its inputs have the tower's width.
        [first] = [rule.name for rule in source.rules if rule.path == "projector/linear_0/kernel"]
        width = source.checkpoint[first].shape[-1] if first in source.checkpoint else 8
        vision = VisionConfig(
            image_size=1,
            patch_size=1,
            hidden_size=width,
            intermediate_size=1,
            num_layers=1,
            num_heads=1,
            select_layer=-1,
        )
    decoder = source.decoder or DecoderConfig(
        vocab_size=1,
        real_ids=((0, 1),),
        hidden_size=2,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
    )
    image = source.tokenizer.image_id if source.tokenizer else 0
    return ModelConfig(
        decoder=decoder,
        vision=vision,
        projector=source.projector or "linear",
        template=source.template,
        image_token_id=image,
        context=source.context,
    )


def _file(file: Path) -> dict[str, Any]:
    checkpoint = read_file(file)
    facts = _tensors("projector", checkpoint)
    total = sum(facts["dtypes"].values())
    return facts | {
        "parameters": total,
        "parts": {"projector": total},
        "uses": ["import as --projector"],
    }


def _tensors(kind: str, checkpoint: Checkpoint) -> dict[str, Any]:
    dtypes: collections.Counter[str] = collections.Counter()
    for tensor in checkpoint.values():
        dtypes[tensor.dtype.name] += math.prod(tensor.shape)
    return {"kind": kind, "tensors": len(checkpoint), "dtypes": dict(dtypes)}


def _part(path: str) -> str:
    """Returns the part of a model that a rule path belongs to."""
    names = {
        "/moe/experts_": "experts",
        "/moe/": "routers",
        "/mlp/": "feed-forward",
        "/attention/": "attention",
        "/embedding": "embeddings",
        "/head": "embeddings",
    }
    if not path.startswith("decoder/"):
        return path.split("/", maxsplit=1)[0]
    return next((part for key, part in names.items() if key in path), "norms")


def _sizes(
    config: ModelConfig, parts: Sequence[str] = ("decoder", "vision", "projector")
) -> dict[str, Any]:
    sizes: collections.Counter[str] = collections.Counter()
    for path, slot in slots(config).items():
        if path.split("/")[0] in parts:
            sizes[_part(path)] += math.prod(slot.shape)
    return {"parameters": sizes.total(), "parts": dict(sizes)}


def _activated(config: ModelConfig) -> dict[str, int]:
    return {"activated": parameter_counts(config)[1]}


def _architecture(config: ModelConfig) -> dict[str, Any]:
    decoder, vision = config.decoder, config.vision
    facts: dict[str, Any] = {
        "template": config.template,
        "layers": decoder.num_layers,
        "width": decoder.hidden_size,
        "plan": [_format_segment(segment) for segment in decoder.plan],
    }
    if decoder.moe is not None:
        moe = decoder.moe
        facts["experts"] = {
            "layers": list(decoder.moe_layers),
            "num_experts": moe.num_experts,
            "top_k": moe.top_k,
        }
    if vision is not None:
        facts["image"] = _image(vision)
    return facts


def _format_segment(segment: Segment) -> str:
    """Formats a segment, for example as `(experts, dense) x 12`."""
    kinds = ", ".join("experts" if has_experts else "dense" for has_experts in segment.pattern)
    return f"({kinds}) x {segment.repeats}"


def _image(vision: VisionConfig) -> dict[str, int]:
    return {"size": vision.image_size, "positions": vision.patches}


def _tokenizer(tokenizer: Tokenizer) -> dict[str, int]:
    return {
        "ids": num_ids(tokenizer.real_ids),
        "image": tokenizer.image_id,
        "pad": tokenizer.pad_id,
    }
