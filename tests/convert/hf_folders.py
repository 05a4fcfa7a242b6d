"""Hugging Face folders of small models with random weights, as `transformers` writes them."""

import dataclasses
import json
from pathlib import Path

from safetensors.numpy import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from moddistill.data.tokenizer import Tokenizer
from tests import torch_or_skip as torch
from tests.parity.convert import randomise


def random_model(kind, config, seed=0):
    """A torch model of a class of `transformers`, with random weights."""
    torch.load_module()
    return randomise(kind(config), seed)


@dataclasses.dataclass(frozen=True)
class Text:
    """Sizes of a language model; `head_dim` is only set for Qwen3."""

    hidden_size: int = 32
    intermediate_size: int = 48
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 0
    tied: bool = True
    rows: int = 320

    def config(self, **more):
        kind = Qwen3Config if self.head_dim else Qwen2Config
        if self.head_dim:
            more["head_dim"] = self.head_dim
        return kind(
            vocab_size=self.rows,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            **more,
        )

    def model(self):
        kind = Qwen3ForCausalLM if self.head_dim else Qwen2ForCausalLM
        return random_model(kind, self.config())


QWEN2 = {
    "two queries a key": Text(),
    "seven queries a key": Text(hidden_size=56, num_heads=14, num_kv_heads=2),
    "three heads, untied": Text(hidden_size=24, num_heads=3, num_kv_heads=3, tied=False),
}
QWEN3 = {
    "wide heads": Text(head_dim=16),
    "five heads, untied": Text(
        hidden_size=40, num_heads=5, num_kv_heads=1, head_dim=12, tied=False
    ),
}


def clip_config(**changes):
    return CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        **({"image_size": 12, "patch_size": 6} | changes),
    )


def siglip_config(**changes):
    """A CLIP config: 30 pixels are 4 patches of 7 per side, and 2 pixels without a patch."""
    return SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=30,
        patch_size=7,
        **({"vision_use_head": False} | changes),
    )


def llava(text, vision, image_token):
    """A LLaVA of a text config and a vision config, with random weights."""
    is_clip = isinstance(vision, CLIPVisionConfig)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        vision_feature_layer=-2 if is_clip else -1,
        vision_feature_select_strategy="default" if is_clip else "full",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return random_model(LlavaForConditionalGeneration, config)


def multimodal(name, image_token):
    """The LLaVA that a name such as `SigLIP and Qwen2, three heads` describes."""
    sizes = {}
    if "seven queries" in name:
        sizes = {"hidden_size": 56, "num_heads": 14}
    if "three heads" in name:
        sizes = {"hidden_size": 24, "num_heads": 3, "num_kv_heads": 3}
    text = Text(tied="untied" not in name, head_dim=16 if "Qwen3" in name else 0, **sizes)
    vision = clip_config()
    if "SigLIP" in name:
        vision = siglip_config(vision_use_head="pooling" in name)
    return llava(text.config(), vision, image_token)


def sparse_text(text: Text, **changes):
    """A Qwen2-MoE config whose middle layer is dense."""
    return Qwen2MoeConfig(
        **{
            key: value
            for key, value in text.config().to_dict().items()
            if key not in ("model_type", "layer_types", "architectures")
        },
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=text.intermediate_size,
        shared_expert_intermediate_size=8,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        **changes,
    )


def clear_shared_expert(model):
    for name, parameter in model.named_parameters():
        if "shared_expert" in name:
            parameter.data.zero_()
    return model


def clip_tower():
    return random_model(CLIPVisionModel, clip_config())


def siglip_tower(**changes):
    return random_model(SiglipVisionModel, siglip_config(**changes))


def save(model, folder: Path, tokenizer: Tokenizer | None = None, **options) -> Path:
    """Writes a model and, for those with text, a tokenizer."""
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save(str(folder))
    return folder


def save_original(
    state: dict[str, "torch.Tensor"], config: dict, folder: Path, tokenizer: Tokenizer
) -> Path:
    """Writes a folder as LLaVA's code does: its tensor names and config, weights as `.bin`."""
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder))
    return folder


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    save_file(change(state), folder / "model.safetensors")


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
