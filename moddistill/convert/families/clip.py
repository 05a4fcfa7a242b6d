"""CLIP's vision tower: tensor names and config fields."""

from collections.abc import Mapping
from typing import Any

from moddistill.convert.rules import FLATTEN, PATCH_KERNEL, Rule, Rules, linear_kernel
from moddistill.errors import not_one_of
from moddistill.models import limits
from moddistill.models.vision import VisionConfig

# Names of sizes in `VisionConfig`, and in a config of `transformers`.
SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
}
# The fields that are read, with the largest value of numbers.
READ_FIELDS = limits.spelt(limits.VISION, SIZES) | {"hidden_act": None}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}


def layer_rules() -> Rules:
    """Returns the rules of the transformer layers, which are those of SigLIP too."""
    layer = "encoder.layers.{layer}"
    path = "vision/layers/{layer}"
    rules = []
    for hf_name, name in (("layer_norm1", "attention_norm"), ("layer_norm2", "mlp_norm")):
        rules += [
            Rule(f"{layer}.{hf_name}.weight", f"{path}/{name}/scale"),
            Rule(f"{layer}.{hf_name}.bias", f"{path}/{name}/bias"),
        ]
    for hf_name, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        rules += [
            Rule(
                f"{layer}.self_attn.{hf_name}.weight",
                f"{path}/attention/{name}/kernel",
                linear_kernel(),
            ),
            Rule(f"{layer}.self_attn.{hf_name}.bias", f"{path}/attention/{name}/bias", FLATTEN),
        ]
    out = f"{layer}.self_attn.out_proj"
    rules += [
        Rule(f"{out}.weight", f"{path}/attention/out/kernel", linear_kernel(inputs=2)),
        Rule(f"{out}.bias", f"{path}/attention/out/bias"),
    ]
    for hf_name, name in (("fc1", "up"), ("fc2", "down")):
        rules += [
            Rule(f"{layer}.mlp.{hf_name}.weight", f"{path}/{name}/kernel", linear_kernel()),
            Rule(f"{layer}.mlp.{hf_name}.bias", f"{path}/{name}/bias"),
        ]
    return tuple(rules)


RULES: Rules = (
    Rule("embeddings.class_embedding", "vision/class_token"),
    Rule("embeddings.patch_embedding.weight", "vision/patch/kernel", PATCH_KERNEL),
    Rule("embeddings.position_embedding.weight", "vision/positions"),
    # The misspelling is that of the published checkpoints.
    Rule("pre_layrnorm.weight", "vision/pre_norm/scale"),
    Rule("pre_layrnorm.bias", "vision/pre_norm/bias"),
    *layer_rules(),
    Rule("post_layernorm.weight", "vision/post_norm/scale"),
    Rule("post_layernorm.bias", "vision/post_norm/bias"),
)


def vision_config(
    hf: Mapping[str, Any], select_layer: int, pixels: Mapping[str, Any], origin: str
) -> VisionConfig:
    """Returns the architecture of a vision config.

    Args:
      hf: fields with the defaults of `transformers`.
      select_layer: hidden state whose features are used, counted from the end.
      pixels: `mean` and `std` of the pixels, if the image processor has them.

    Raises:
      UserError: an unsupported activation, or sizes out of range.
    """
    activation = hf.get("hidden_act")
    if activation not in tuple(ACTIVATIONS):
        raise not_one_of(f"{origin}: hidden_act", activation, ACTIVATIONS)
    return build_vision_config(
        hf, origin, select_layer=select_layer, activation=ACTIVATIONS[activation], **pixels
    )


def build_vision_config(hf: Mapping[str, Any], origin: str, **others: Any) -> VisionConfig:
    """Returns a vision tower with the sizes of a config; UserError for sizes out of range."""
    sizes = {name: hf.get(hf_name) for name, hf_name in SIZES.items()}
    limits.check_numbers(sizes, limits.VISION, origin, SIZES.get)
    config = VisionConfig(**(sizes | {"norm_eps": float(sizes["norm_eps"])}), **others)
    limits.check_vision(config, origin, lambda name: SIZES.get(name, name))
    return config


def hf_config(vision: VisionConfig) -> dict[str, Any]:
    """Returns the fields of a vision config; the inverse of `vision_config`."""
    return {
        "model_type": "clip_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_eps,
    }
