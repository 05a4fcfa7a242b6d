"""Tensor names of published LLaVA checkpoints, written out independently of the converter's rules.

`llava-hf/llava-interleave-qwen-0.5b-hf` (SigLIP and Qwen2) and `llava-hf/llava-1.5-7b-hf` (CLIP)
have them. vLLM's `LlavaForConditionalGeneration` loads these, and through its `hf_to_vllm_mapper`
(vllm/model_executor/models/llava.py) those that `vllm_name` maps to them; its towers hold a
`vision_model` (clip.py, siglip.py), so that it has no module for `vision_tower.embeddings...`.
"""

import re

_MAPPER = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def vllm_name(name):
    """Returns the name under which vLLM loads a tensor of a checkpoint; it replaces one prefix."""
    prefix = next((prefix for prefix in _MAPPER if name.startswith(prefix)), "")
    return _MAPPER.get(prefix, "") + name.removeprefix(prefix)


def published_name(name):
    """The published name of a tensor, from any name that a release of `transformers` saves."""
    return re.sub(
        r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", vllm_name(name)
    )


def published_names(config):
    """All names of a LLaVA with these fields of `config.json`."""
    text, vision = config["text_config"], config["vision_config"]
    names = [f"vision_tower.vision_model.{name}" for name in _tower(vision)]
    names += affine("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
    names += [f"language_model.model.{name}" for name in _decoder(text)]
    names += [] if text["tie_word_embeddings"] else ["language_model.lm_head.weight"]
    return set(names)


def affine(*modules):
    return [f"{module}.{part}" for module in modules for part in ("weight", "bias")]


def _tower(vision):
    names = ["embeddings.position_embedding.weight", *affine("post_layernorm")]
    if vision["model_type"] == "clip_vision_model":
        names += ["embeddings.class_embedding", "embeddings.patch_embedding.weight"]
        names += affine("pre_layrnorm")
    else:
        names += affine("embeddings.patch_embedding")
    if vision.get("vision_use_head"):
        names += ["head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias"]
        names += affine("head.attention.out_proj", "head.layernorm", "head.mlp.fc1", "head.mlp.fc2")
    for i in range(vision["num_hidden_layers"]):
        layer = f"encoder.layers.{i}."
        names += affine(layer + "layer_norm1", layer + "layer_norm2")
        names += affine(layer + "mlp.fc1", layer + "mlp.fc2")
        names += affine(*(f"{layer}self_attn.{x}_proj" for x in ("q", "k", "v", "out")))
    return names


def _decoder(text):
    names = ["embed_tokens.weight", "norm.weight"]
    for i in range(text["num_hidden_layers"]):
        layer = f"layers.{i}."
        names += [f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"]
        names += [f"{layer}self_attn.{x}_proj.weight" for x in "qkvo"]
        if "qwen2" in text["model_type"]:
            names += [f"{layer}self_attn.{x}_proj.bias" for x in "qkv"]
        else:
            names += [f"{layer}self_attn.{x}_norm.weight" for x in "qk"]
        names += [f"{layer}mlp.{name}" for name in _mlp(text, i)]
    return names


def _mlp(text, layer):
    """Of Qwen2 and Qwen3, and of Qwen2-MoE and Qwen3-MoE as published expert by expert."""
    kernels = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    if "moe" not in text["model_type"] or layer in text["mlp_only_layers"]:
        return kernels
    names = [f"experts.{n}.{name}" for n in range(text["num_experts"]) for name in kernels]
    if text["model_type"] == "qwen2_moe":
        names += [f"shared_expert.{name}" for name in kernels] + ["shared_expert_gate.weight"]
    return ["gate.weight", *names]
