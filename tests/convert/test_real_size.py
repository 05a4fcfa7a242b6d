"""Published sizes: CLIP ViT-L/14-336 and Qwen2-0.5B, with random weights."""

import dataclasses
import gc

import numpy as np
import pytest
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from moddistill.convert.importing import import_model
from moddistill.data.tokenizer import load_tokenizer
from moddistill.models.flops import parameter_counts
from moddistill.models.presets import preset
from tests import torch_or_skip as torch
from tests.data.qwen_ranks import write_tokenizer_json


@pytest.fixture
def llava(tmp_path):
    """A torch model with activations of order one, and the folder it is saved in."""
    decoder, tower = preset("qwen2-0.5b").decoder, preset("qwen2-0.5b").vision
    text = Qwen2Config(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
    )
    vision = CLIPVisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_hidden_layers=tower.num_layers,
        num_attention_heads=tower.num_heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
    )
    write_tokenizer_json(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_id,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # As wide as in trained models, where logits spread over several units.
            parameter.mul_(1.5) if parameter.ndim > 1 else parameter.add_(
                0.1 * torch.randn_like(parameter)
            )
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save(str(tmp_path / "hf"))
    return model, tmp_path / "hf"


@pytest.mark.slow
def test_logits_at_the_published_size_equal_transformers(
    llava, tmp_path, torch_logits, model_logits, random_inputs
):
    model, folder = llava
    config = import_model(str(folder), tmp_path / "model", template="vicuna")
    context = model.config.text_config.max_position_embeddings
    assert config == dataclasses.replace(preset("qwen2-0.5b"), context=context)
    assert parameter_counts(config)[0] == sum(x.numel() for x in model.parameters())
    tokens, images = random_inputs(config, length=23)
    tokens, images = tokens[:1], images[:1]
    expected = torch_logits(model, tokens, images, config)
    del model, llava
    gc.collect()
    assert expected.std() > 0.1
    np.testing.assert_allclose(
        model_logits(tmp_path / "model", tokens, images), expected, atol=1e-3
    )
