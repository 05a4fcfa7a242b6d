"""CLIP's vision tower: names of tensors and fields of configs."""

from collections.abc import Mapping
from typing import Any

from moddistill.convert.rules import FLATTEN, PATCH_KERNEL, Rule, Rules, linear_kernel
from moddistill.errors import UserError
from moddistill.models import limits
from moddistill.models.vision import VisionConfig

# Names of sizes here, and in a config.
SIZES = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "mlp": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
}
# The fields of a config that are read, and the largest value of those that are numbers.
READ = limits.spelt(limits.VISION, SIZES) | {"hidden_act": None}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}


def layer_rules() -> Rules:
    """The transformer layers, which SigLIP has under the same names."""
    layer = "encoder.layers.{layer}"
    path = "vision/layers/{layer}"
    rules = []
    for theirs, ours in (("layer_norm1", "attention_norm"), ("layer_norm2", "mlp_norm")):
        rules += [
            Rule(f"{layer}.{theirs}.weight", f"{path}/{ours}/scale"),
            Rule(f"{layer}.{theirs}.bias", f"{path}/{ours}/bias"),
        ]
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        rules += [
            Rule(
                f"{layer}.self_attn.{theirs}.weight",
                f"{path}/attention/{ours}/kernel",
                linear_kernel(),
            ),
            Rule(f"{layer}.self_attn.{theirs}.bias", f"{path}/attention/{ours}/bias", FLATTEN),
        ]
    out = f"{layer}.self_attn.out_proj"
    rules += [
        Rule(f"{out}.weight", f"{path}/attention/out/kernel", linear_kernel(inputs=2)),
        Rule(f"{out}.bias", f"{path}/attention/out/bias"),
    ]
    for theirs, ours in (("fc1", "up"), ("fc2", "down")):
        rules += [
            Rule(f"{layer}.mlp.{theirs}.weight", f"{path}/{ours}/kernel", linear_kernel()),
            Rule(f"{layer}.mlp.{theirs}.bias", f"{path}/{ours}/bias"),
        ]
    return tuple(rules)


RULES: Rules = (
    Rule("embeddings.class_embedding", "vision/class_token"),
    Rule("embeddings.patch_embedding.weight", "vision/patch/kernel", PATCH_KERNEL),
    Rule("embeddings.position_embedding.weight", "vision/positions"),
    # The misspelling is the published one.
    Rule("pre_layrnorm.weight", "vision/pre_norm/scale"),
    Rule("pre_layrnorm.bias", "vision/pre_norm/bias"),
    *layer_rules(),
    Rule("post_layernorm.weight", "vision/post_norm/scale"),
    Rule("post_layernorm.bias", "vision/post_norm/bias"),
)


def vision_config(
    hf: Mapping[str, Any], select_layer: int, pixels: Mapping[str, Any], origin: str
) -> VisionConfig:
    """The tower that a vision config states.

    Args:
      hf: fields with their defaults, as `transformers` gives them.
      select_layer: hidden state whose features are used, counted from the end.
      pixels: `mean` and `std` of the pixels, where a processor's config states them.

    Raises:
      UserError: for an activation that is not built, or sizes that make no sense.
    """
    activation = hf.get("hidden_act")
    if activation not in tuple(ACTIVATIONS):
        raise UserError(
            f"{origin}: hidden_act is {activation!r:.80}; accepted: {', '.join(ACTIVATIONS)}"
        )
    return build_vision_config(
        hf, origin, select_layer=select_layer, activation=ACTIVATIONS[activation], **pixels
    )


def build_vision_config(hf: Mapping[str, Any], origin: str, **others: Any) -> VisionConfig:
    """The tower with the sizes of a config; UserError for those that make no sense."""
    sizes = {ours: hf.get(theirs) for ours, theirs in SIZES.items()}
    limits.check_numbers(sizes, limits.VISION, origin, SIZES.get)
    config = VisionConfig(**(sizes | {"norm_eps": float(sizes["norm_eps"])}), **others)
    limits.check_vision(config, origin, lambda name: SIZES.get(name, name))
    return config


def hf_config(vision: VisionConfig) -> dict[str, Any]:
    """The fields of a vision config for a tower; the inverse of `vision_config`."""
    return {
        "model_type": "clip_vision_model",
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_eps,
    }
