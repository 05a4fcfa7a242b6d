"""Torch models with random weights, and torch weights as parameters of this library."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moddistill.models.decoder import DecoderConfig
from moddistill.models.layer_plan import stack
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import check_same, flatten
from tests import torch_or_skip as torch


def randomise(model, seed=0):
    """Weights that make outputs of order one; biases and norms away from where they start.

    Three axes are those of stacked experts, four those of the patch convolution.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.data += 0.2 * noise
        else:
            fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
            parameter.data = noise * fan_in**-0.5
    return model.float().eval()


def pixel_values(images, config: VisionConfig):
    """What a torch model gets for uint8 images [B, H, W, 3]."""
    scaled = images.astype(np.float64) / 255
    normal = (scaled - np.array(config.mean)) / np.array(config.std)
    return torch.tensor(normal.transpose(0, 3, 1, 2), dtype=torch.float32)


def numpy_state(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def part(state, prefix):
    """The entries below a prefix, without it."""
    return {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}


def model_params(state, config: ModelConfig):
    """All parameters of `config` from a LLaVA or Qwen state; every one is accounted for."""
    if config.vision is None:
        params = {"decoder": decoder_params(part(state, "model."), state, config.decoder)}
    else:
        language = part(state, "model.language_model.")
        params = {
            "decoder": decoder_params(language, state, config.decoder),
            "vision": vision_params(part(state, "model.vision_tower."), config.vision),
            "projector": {
                f"linear_{i}": _linear(state, f"model.multi_modal_projector.linear_{i + 1}")
                for i in range(2)
            },
        }
    check_same(flatten(params), flatten(nn.unbox(abstract_params(config))), "converted weights")
    return params


def decoder_params(state, heads, config: DecoderConfig):
    layers = [_decoder_layer(part(state, f"layers.{i}."), config) for i in range(config.num_layers)]
    params = {
        "embedding": jnp.asarray(state["embed_tokens.weight"]),
        "norm": {"scale": jnp.asarray(state["norm.weight"])},
        **stack(layers, config.plan),
    }
    if not config.tie_word_embeddings:
        params["head"] = jnp.asarray(heads["lm_head.weight"])
    return params


def _decoder_layer(state, config: DecoderConfig):
    mlp = {
        name: {"kernel": jnp.asarray(state[f"mlp.{name}_proj.weight"].T)}
        for name in ("gate", "up", "down")
    }
    attention = _attention(state, "o_proj", config.head_dim)
    if config.qk_norm:
        for name in ("query", "key"):
            scale = state[f"self_attn.{name[0]}_norm.weight"]
            attention[f"{name}_norm"] = {"scale": jnp.asarray(scale)}
    return {
        "attention": attention,
        "attention_norm": {"scale": jnp.asarray(state["input_layernorm.weight"])},
        "mlp_norm": {"scale": jnp.asarray(state["post_attention_layernorm.weight"])},
        "mlp": mlp,
    }


def vision_params(state, config: VisionConfig):
    """Of CLIP or SigLIP, whichever has the parameters that `config` asks for."""
    patch = state["embeddings.patch_embedding.weight"]  # [D, 3, row, column]
    layers = [
        _vision_layer(part(state, f"encoder.layers.{i}."), config.hidden_size // config.num_heads)
        for i in range(config.num_layers)
    ]
    params = {
        "patch": {
            "kernel": jnp.asarray(patch.transpose(2, 3, 1, 0).reshape(-1, config.hidden_size))
        },
        "positions": jnp.asarray(state["embeddings.position_embedding.weight"]),
        "layers": _stacked(layers[: config.used_layers]),
        "post_norm": _norm(state, "post_layernorm"),
    }
    if config.used_layers < config.num_layers:
        params["unused"] = _stacked(layers[config.used_layers :])
    if config.patch_bias:
        params["patch"]["bias"] = jnp.asarray(state["embeddings.patch_embedding.bias"])
    if config.class_token:
        params["class_token"] = jnp.asarray(state["embeddings.class_embedding"])
    if config.pre_norm:
        params["pre_norm"] = _norm(state, "pre_layrnorm")
    return params


def _stacked(layers):
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def _vision_layer(state, head_dim):
    return {
        "attention": _attention(state, "out_proj", head_dim),
        "attention_norm": _norm(state, "layer_norm1"),
        "mlp_norm": _norm(state, "layer_norm2"),
        "up": _linear(state, "mlp.fc1"),
        "down": _linear(state, "mlp.fc2"),
    }


def _attention(state, out, head_dim):
    """Kernels [D, N, H] and [N, H, D] from matrices [N * H, D] and [D, N * H]."""
    params = {}
    for name in ("query", "key", "value"):
        linear = _linear(state, f"self_attn.{name[0]}_proj")
        kernel = linear["kernel"]
        params[name] = {"kernel": kernel.reshape(kernel.shape[0], -1, head_dim)}
        if "bias" in linear:
            params[name]["bias"] = linear["bias"].reshape(-1, head_dim)
    linear = _linear(state, f"self_attn.{out}")
    kernel = linear["kernel"]
    params["out"] = linear | {"kernel": kernel.reshape(-1, head_dim, kernel.shape[1])}
    return params


def _linear(state, name):
    params = {"kernel": jnp.asarray(state[f"{name}.weight"].T)}
    if f"{name}.bias" in state:
        params["bias"] = jnp.asarray(state[f"{name}.bias"])
    return params


def _norm(state, name):
    return {
        "scale": jnp.asarray(state[f"{name}.weight"]),
        "bias": jnp.asarray(state[f"{name}.bias"]),
    }
