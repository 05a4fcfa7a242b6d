import dataclasses

import jax
import numpy as np
import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from moddistill.models.batch import padded_batch
from moddistill.models.decoder import DecoderConfig
from moddistill.models.vlm import ModelConfig, Vlm
from tests import torch_or_skip as torch
from tests.parity.convert import model_params, numpy_state, randomise

BASE = DecoderConfig(
    vocab_size=97,
    real_ids=((0, 90),),
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
)
DECODERS = {
    "every head its own keys": BASE,
    "two queries a key": dataclasses.replace(BASE, num_kv_heads=2),
    "seven queries a key": dataclasses.replace(
        BASE, hidden_size=56, num_heads=14, num_kv_heads=2, head_dim=4
    ),
    "three heads": dataclasses.replace(BASE, hidden_size=24, num_heads=3, num_kv_heads=3),
    "nine heads on three keys": dataclasses.replace(
        BASE, hidden_size=36, num_heads=9, num_kv_heads=3, head_dim=4
    ),
    "one layer": dataclasses.replace(BASE, num_layers=1),
    "untied head": dataclasses.replace(BASE, num_kv_heads=2, tie_word_embeddings=False),
    "short rotary period": dataclasses.replace(BASE, rope_theta=1e4),
    "large norm epsilon": dataclasses.replace(BASE, norm_eps=1e-2),
}

NORMED = dataclasses.replace(BASE, qkv_bias=False, qk_norm=True)
DECODERS_3 = {
    "heads as wide as the layer in all": NORMED,
    "wider heads": dataclasses.replace(NORMED, num_kv_heads=2, head_dim=20),
    "narrower heads": dataclasses.replace(NORMED, head_dim=4),
    "three wider heads": dataclasses.replace(
        NORMED, hidden_size=20, num_heads=3, num_kv_heads=3, head_dim=10
    ),
    "nine heads on three keys": dataclasses.replace(
        NORMED, hidden_size=32, num_heads=9, num_kv_heads=3, head_dim=6
    ),
    "untied head": dataclasses.replace(NORMED, num_kv_heads=1, tie_word_embeddings=False),
    "large norm epsilon": dataclasses.replace(NORMED, norm_eps=1e-2),
}


def qwen2_config(config):
    return Qwen2Config(**_sizes(config))


def qwen3_config(config):
    return Qwen3Config(head_dim=config.head_dim, **_sizes(config))


def _sizes(config):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
def test_logits_equal_those_of_qwen2_on_a_padded_batch(config):
    check_logits(randomise(Qwen2ForCausalLM(qwen2_config(config))), config)


@pytest.mark.parametrize("config", DECODERS_3.values(), ids=DECODERS_3)
def test_logits_equal_those_of_qwen3_on_a_padded_batch(config):
    check_logits(randomise(Qwen3ForCausalLM(qwen3_config(config))), config)


def check_logits(model, config):
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 11), np.int32)
    valid = np.arange(11)[None] < np.array([11, 7, 1])[:, None]
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(valid).long()
        ).logits.numpy()

    vlm = ModelConfig(config, None, "linear", "vicuna", image_token_id=config.vocab_size)
    batch = padded_batch(tokens, valid.sum(axis=1))
    output = jax.jit(Vlm(vlm).apply)({"params": model_params(numpy_state(model), vlm)}, batch)
    ours = np.asarray(Vlm.logits(output))

    assert theirs.std() > 0.5
    np.testing.assert_allclose(ours[valid], theirs[valid], atol=1e-4)
