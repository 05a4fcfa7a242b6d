"""SigLIP's vision tower: as CLIP, without class token and pre-norm, with a bias on patches."""

from collections.abc import Mapping
from typing import Any

from moddistill.convert.families import clip
from moddistill.convert.rules import PATCH_KERNEL, Rule, Rules
from moddistill.errors import invalid
from moddistill.models.vision import VisionConfig

MEAN = STD = (0.5, 0.5, 0.5)
RULES: Rules = (
    Rule("embeddings.patch_embedding.weight", "vision/patch/kernel", PATCH_KERNEL),
    Rule("embeddings.patch_embedding.bias", "vision/patch/bias"),
    Rule("embeddings.position_embedding.weight", "vision/positions"),
    *clip.layer_rules(),
    Rule("post_layernorm.weight", "vision/post_norm/scale"),
    Rule("post_layernorm.bias", "vision/post_norm/bias"),
)


def vision_config(
    hf: Mapping[str, Any], select_layer: int, pixels: Mapping[str, Any], origin: str
) -> VisionConfig:
    """Returns the architecture of a vision config; arguments and errors as in `clip`."""
    activation = hf.get("hidden_act")
    if activation != "gelu_pytorch_tanh":
        raise invalid(f"{origin}: hidden_act", activation, "'gelu_pytorch_tanh'")
    return clip.build_vision_config(
        hf,
        origin,
        select_layer=select_layer,
        activation="gelu_tanh",
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        **({"mean": MEAN, "std": STD} | dict(pixels)),
    )


def hf_config(vision: VisionConfig) -> dict[str, Any]:
    """Returns the fields of a vision config; the inverse of `vision_config`."""
    return clip.hf_config(vision) | {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,
    }
