"""Multimodal checkpoints: LLaVA of `transformers`, and of LLaVA's own code."""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

from moddistill.convert.families import clip, qwen, siglip
from moddistill.convert.rules import Rule, Rules, linear_kernel, prefixed
from moddistill.errors import invalid
from moddistill.models.projector import projector_depth
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig

TOWERS = {
    "clip_vision_model": clip,
    "siglip_vision_model": siglip,
}
# Models of a vision tower and a text encoder, whose tensors are ignored.
DUAL_ENCODERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}

# Prefixes of decoder, head, vision tower and projector in published checkpoints. All releases of
# `transformers`, and vLLM, load them, so exports have them.
PUBLISHED_PREFIXES = (
    "language_model.model.",
    "language_model.",
    "vision_tower.vision_model.",
    "multi_modal_projector.",
)
# All prefixes with which releases of `transformers` save checkpoints.
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

# The fields that are read, by model type, with the largest value of numbers.
READ_FIELDS = {
    **qwen.READ_FIELDS,
    "clip_vision_model": clip.READ_FIELDS,
    "siglip_vision_model": clip.READ_FIELDS,
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
    """Returns the rules of a projector of LLaVA's code: an `nn.Sequential`, or one layer."""
    # Indices of an `nn.Sequential` count the activations between linear layers.
    names = [f"{2 * i}." for i in range(projector_depth(kind))] if kind != "linear" else [""]
    return tuple(
        rule
        for i, name in enumerate(names)
        for rule in (
            Rule(f"{name}weight", f"projector/linear_{i}/kernel", linear_kernel()),
            Rule(f"{name}bias", f"projector/linear_{i}/bias"),
        )
    )


def checkpoint_rules(prefixes: tuple[str, str, str, str], tower: Any) -> Rules:
    """Returns the rules of a multimodal checkpoint.

    Args:
      prefixes: an element of `PREFIX_VARIANTS`.
      tower: module of the vision tower's family.
    """
    decoder, head, vision, projector = prefixes
    return (
        *prefixed(qwen.RULES + qwen.EXPERTS, decoder),
        *prefixed(qwen.HEAD, head),
        *prefixed(tower.RULES, vision),
        *prefixed(PROJECTOR, projector),
    )


def find_prefixes(names: Iterable[str], tower: Any) -> tuple[str, str, str, str]:
    """Returns the prefixes with rules for most of the tensor names."""

    def num_matches(prefixes: tuple[str, str, str, str]) -> int:
        return sum(
            counts[_without_numbers(rule.name)] for rule in checkpoint_rules(prefixes, tower)
        )

    counts = collections.Counter(map(_without_numbers, names))
    return max(PREFIX_VARIANTS, key=num_matches)


def _without_numbers(name: str) -> str:
    """Replaces the numbers of layer and expert in the name of a tensor or rule."""
    return re.sub(r"\{\w+\}|\d+", "#", name)


def tower_family(vision: VisionConfig) -> Any:
    """Returns the module of a vision tower's family."""
    return clip if vision.class_token else siglip


def select_layer(hf: Mapping[str, Any], origin: str) -> int:
    """Returns the hidden state of the vision tower that a LLaVA config selects.

    Raises:
      UserError: several hidden states, one counted from the start, or features that are not exactly
        those of the patches.
    """
    layer = hf.get("vision_feature_layer")
    strategy = hf.get("vision_feature_select_strategy")
    expected = "default" if hf["vision_config"]["model_type"] == "clip_vision_model" else "full"
    if type(layer) is not int or layer >= 0:
        raise invalid(f"{origin}: vision_feature_layer", layer, "one whole number below 0")
    if strategy != expected:
        kind = hf["vision_config"]["model_type"]
        raise invalid(
            f"{origin}: vision_feature_select_strategy",
            strategy,
            f"{expected!r} for {kind}, which selects all patches and no other token",
        )
    return layer


def check_original(fields: Mapping[str, Any], origin: str) -> None:
    """Raises UserError for unsupported settings of LLaVA's code."""
    accepted = {
        "mm_vision_select_feature": ("patch", None),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
    }
    for name, values in accepted.items():
        if fields.get(name) not in values:
            raise invalid(f"{origin}: {name}", fields[name], repr(values[0]))


def check_projector(hf: Mapping[str, Any], origin: str) -> None:
    """Raises UserError unless the projector is two layers with exact GELU and biases."""
    settings = hf["projector_hidden_act"], hf.get("multimodal_projector_bias", True)
    if settings != ("gelu", True):
        names = "projector_hidden_act and multimodal_projector_bias"
        raise invalid(f"{origin}: {names}", settings, "('gelu', True)")


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a LLaVA config for a multimodal model.

    Raises:
      UserError: another projector than `mlp2x_gelu`, or `<image>` has no embedding row.
    """
    if config.projector != "mlp2x_gelu":
        expected = "'mlp2x_gelu', the one of LlavaForConditionalGeneration"
        raise invalid("projector", config.projector, expected)
    if config.image_token_id >= config.decoder.vocab_size:
        expected = f"an id below {config.decoder.vocab_size}, the rows of the embedding"
        raise invalid("image_token_id", config.image_token_id, expected)
    vision = config.vision
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": vision.patches,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": "default" if vision.class_token else "full",
        "tie_word_embeddings": config.decoder.tie_word_embeddings,
        "text_config": qwen.text_config(config.decoder),
        "vision_config": tower_family(vision).hf_config(vision),
    }
