"""Whole multimodal checkpoints: Hugging Face's LLaVA, and the original code's."""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

from moddistill.convert.families import clip, qwen, siglip
from moddistill.convert.rules import Rule, Rules, linear_kernel, prefixed
from moddistill.errors import UserError
from moddistill.models.projector import projector_depth
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig

TOWERS = {
    "clip_vision_model": clip,
    "siglip_vision_model": siglip,
}
# What holds a tower together with a text encoder, whose tensors are left alone.
DUAL_ENCODERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}

# Prefixes of the decoder, the head, the tower and the projector in published checkpoints, which
# every release of `transformers` loads, and vLLM's LlavaForConditionalGeneration too.
PUBLISHED_PREFIXES = (
    "language_model.model.",
    "language_model.",
    "vision_tower.vision_model.",
    "multi_modal_projector.",
)
# All prefixes under which releases of `transformers` have saved them.
PREFIX_VARIANTS = (
    PUBLISHED_PREFIXES,
    ("language_model.model.", "language_model.", "vision_tower.", "multi_modal_projector."),
    (
        "model.language_model.",
        "",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
    ),
    ("model.language_model.", "", "model.vision_tower.", "model.multi_modal_projector."),
)

# The fields of a config that are read, by its type, and the largest value of some numbers.
READ = {
    **qwen.READ,
    "clip_vision_model": clip.READ,
    "siglip_vision_model": clip.READ,
    "llava": dict.fromkeys(
        (
            "image_token_index",
            "image_token_id",
            "projector_hidden_act",
            "multimodal_projector_bias",
            "vision_feature_layer",
            "vision_feature_select_strategy",
            "tie_word_embeddings",
            "text_config",
            "vision_config",
        )
    ),
}

PROJECTOR: Rules = tuple(
    rule
    for number in (1, 2)
    for rule in (
        Rule(f"linear_{number}.weight", f"projector/linear_{number - 1}/kernel", linear_kernel()),
        Rule(f"linear_{number}.bias", f"projector/linear_{number - 1}/bias"),
    )
)


def original_projector(kind: str) -> Rules:
    """The original code's projector: a sequence that counts activations too, or one layer."""
    names = [f"{2 * i}." for i in range(projector_depth(kind))] if kind != "linear" else [""]
    return tuple(
        rule
        for i, name in enumerate(names)
        for rule in (
            Rule(f"{name}weight", f"projector/linear_{i}/kernel", linear_kernel()),
            Rule(f"{name}bias", f"projector/linear_{i}/bias"),
        )
    )


def checkpoint_rules(spelling: tuple[str, str, str, str], tower: Any) -> Rules:
    """All rules of a multimodal checkpoint whose tower is of the family `tower`."""
    decoder, head, vision, projector = spelling
    return (
        *prefixed(qwen.RULES + qwen.EXPERTS, decoder),
        *prefixed(qwen.HEAD, head),
        *prefixed(tower.RULES, vision),
        *prefixed(PROJECTOR, projector),
    )


def find_prefixes(names: Iterable[str], tower: Any) -> tuple[str, str, str, str]:
    """The spelling that most names have; `tower` is the family of the tower."""

    def found(spelling: tuple[str, str, str, str]) -> int:
        return sum(count[_shape(rule.name)] for rule in checkpoint_rules(spelling, tower))

    count = collections.Counter(map(_shape, names))
    return max(PREFIX_VARIANTS, key=found)


def _shape(name: str) -> str:
    """A name without the numbers of its layer and expert."""
    return re.sub(r"\{\w+\}|\d+", "#", name)


def tower_family(vision: VisionConfig) -> Any:
    """The family a tower belongs to."""
    return clip if vision.class_token else siglip


def select_layer(hf: Mapping[str, Any], origin: str) -> int:
    """The hidden state of the tower that a LLaVA config selects; UserError for several."""
    layer = hf.get("vision_feature_layer")
    strategy = hf.get("vision_feature_select_strategy")
    wanted = "default" if hf["vision_config"]["model_type"] == "clip_vision_model" else "full"
    if type(layer) is not int or layer >= 0:
        raise UserError(f"{origin}: vision_feature_layer is {layer!r:.80}; accepted: one below 0")
    if strategy != wanted:
        raise UserError(
            f"{origin}: vision_feature_select_strategy is {strategy!r:.80}; accepted: {wanted!r} "
            f"for {hf['vision_config']['model_type']}, so that its patches are kept and no other "
            "token"
        )
    return layer


def check_original(fields: Mapping[str, Any], origin: str) -> None:
    """Raises UserError for settings of the original code that are not built here."""
    accepted = {
        "mm_vision_select_feature": ("patch", None),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
    }
    for name, values in accepted.items():
        if fields.get(name) not in values:
            raise UserError(f"{origin}: {name} is {fields[name]!r:.80}; accepted: {values[0]!r}")


def check_projector(hf: Mapping[str, Any], origin: str) -> None:
    """Raises UserError unless the projector is two layers with exact GELU and biases."""
    found = hf["projector_hidden_act"], hf.get("multimodal_projector_bias", True)
    if found != ("gelu", True):
        raise UserError(
            f"{origin}: projector_hidden_act and multimodal_projector_bias are {found!r:.80}; "
            "accepted: ('gelu', True)"
        )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of a LLaVA config for a multimodal model.

    Raises:
      UserError: for a projector that LLaVA has no place for.
    """
    if config.projector != "mlp2x_gelu":
        raise UserError(
            f"projector is {config.projector!r}; LlavaForConditionalGeneration holds mlp2x_gelu"
        )
    if config.image_token >= config.decoder.vocab_size:
        raise UserError(
            f"the image token is {config.image_token}, the embedding has "
            f"{config.decoder.vocab_size} rows; accepted: an id with a row"
        )
    vision = config.vision
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token,
        "image_seq_length": vision.patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": "default" if vision.class_token else "full",
        "tie_word_embeddings": config.decoder.tied_head,
        "text_config": qwen.text_config(config.decoder),
        "vision_config": tower_family(vision).hf_config(vision),
    }
