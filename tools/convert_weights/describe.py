"""What a folder holds: parameters, dtypes, layer plan, tokenizer, and what to do with it."""

import collections
import math
from pathlib import Path
from typing import Any

from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.model_folder import abstract_params, parameter_counts, read_model_config
from moddistill.models.layer_plan import Segment
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig
from moddistill.sharding import unbox
from moddistill.tree import flatten
from tools.convert_weights.hub import local_folder
from tools.convert_weights.rules import slots
from tools.convert_weights.sources import read_source
from tools.convert_weights.store import Reader


def describe(name: str) -> dict[str, Any]:
    """Facts of a model folder, or of a Hugging Face folder, as one JSON object.

    Raises:
      ValueError: if it is neither.
    """
    folder = Path(name)
    if (folder / "model.json").is_file():
        return _model_folder(folder)
    return _hugging_face(local_folder(name))


def _model_folder(folder: Path) -> dict[str, Any]:
    config = read_model_config(folder)
    reader = Reader(folder / "params")
    dtypes: collections.Counter[str] = collections.Counter()
    for path, leaf in flatten(unbox(abstract_params(config))).items():
        dtypes[reader.dtype(path).name] += leaf.size
    uses = ["train (student or teacher)", "generate", "evaluate", "export"]
    return {
        "kind": "model folder",
        "dtypes": dict(dtypes),
        **_architecture(config),
        "tokenizer": _tokenizer(load_tokenizer(str(folder))),
        "uses": uses + (["upcycle"] if config.decoder.moe is None else []),
    }


def _hugging_face(folder: Path) -> dict[str, Any]:
    source = read_source(folder)
    dtypes: collections.Counter[str] = collections.Counter()
    for tensor in source.checkpoint.values():
        dtypes[tensor.dtype.name] += math.prod(tensor.shape)
    uses = ["import"] if source.decoder else ["import as --vision"]
    facts = {
        "kind": "Hugging Face folder",
        "tensors": len(source.checkpoint),
        "dtypes": dict(dtypes),
        "holds": list(source.parts),
    }
    if source.decoder is not None:
        kind = source.projector or "linear"
        image = source.tokenizer.image_id
        config = ModelConfig(source.decoder, source.vision, kind, source.template, image)
        facts |= _architecture(config) | {"tokenizer": _tokenizer(source.tokenizer)}
    elif source.vision is not None:
        facts["image"] = _image(source.vision)
    return facts | {"uses": uses}


def _part(path: str) -> str:
    """Vision, projector, embeddings, attention, feed-forward, experts or routers."""
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


def _architecture(config: ModelConfig) -> dict[str, Any]:
    decoder, vision = config.decoder, config.vision
    total, activated = parameter_counts(config)
    sizes: collections.Counter[str] = collections.Counter()
    for path, slot in slots(config).items():
        sizes[_part(path)] += math.prod(slot.shape)
    facts = {
        "parameters": total,
        "activated": activated,
        "parts": dict(sizes),
        "template": config.template,
        "layers": decoder.layers,
        "width": decoder.width,
        "plan": [_spell(segment) for segment in decoder.plan],
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


def _spell(segment: Segment) -> str:
    """Such as `(experts, dense) x 12`."""
    kinds = ", ".join("experts" if has_experts else "dense" for has_experts in segment.pattern)
    return f"({kinds}) x {segment.repeats}"


def _image(vision: VisionConfig) -> dict[str, int]:
    return {"size": vision.image_size, "positions": vision.patches}


def _tokenizer(tokenizer: Tokenizer) -> dict[str, int]:
    return {"ids": tokenizer.vocab_size, "image": tokenizer.image_id, "pad": tokenizer.pad_id}
