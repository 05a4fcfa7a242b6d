import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from moddistill.models.qwen import DecoderConfig
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig, Vlm
from tests.parity.convert import model_params, numpy_state, pixel_values, randomise
from tests.parity.test_qwen import qwen2_config

IMAGE = 96
TOWER = VisionConfig(image_size=12, patch_size=6, width=24, mlp=48, layers=3, heads=3)
DECODER = DecoderConfig(
    vocab_size=97, real_vocab=96, width=32, mlp=48, layers=2, heads=4, kv_heads=2, head_dim=8
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied head", "untied head"])
def models(request):
    """A torch LLaVA and ours with the same weights."""
    decoder = dataclasses.replace(DECODER, tied_head=request.param)
    config = ModelConfig(decoder, TOWER, "mlp2x_gelu", "vicuna", IMAGE)
    vision = CLIPVisionConfig(
        hidden_size=TOWER.width,
        intermediate_size=TOWER.mlp,
        num_hidden_layers=TOWER.layers,
        num_attention_heads=TOWER.heads,
        image_size=TOWER.image_size,
        patch_size=TOWER.patch_size,
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=qwen2_config(decoder),
            image_token_index=IMAGE,
            vision_feature_layer=-2,
            tie_word_embeddings=decoder.tied_head,
        )
    )
    randomise(llava)
    params = model_params(numpy_state(llava), config)
    return llava, jax.jit(lambda batch: Vlm.logits(Vlm(config).apply({"params": params}, batch)))


def random_text(rng, length):
    return rng.integers(0, IMAGE, length).tolist()


def layouts(rng):
    """Rows of tokens, each with its number of images; an image takes four positions."""
    image = [IMAGE] * TOWER.patches
    return {
        "one image in the middle": [(random_text(rng, 3) + image + random_text(rng, 4), 1)],
        "image first": [(image + random_text(rng, 4), 1)],
        "image last": [(random_text(rng, 4) + image, 1)],
        "two images": [(random_text(rng, 2) + image + random_text(rng, 3) + image, 2)],
        "two images side by side": [(image + image + random_text(rng, 3), 2)],
        "two, none and one": [
            (random_text(rng, 2) + image + random_text(rng, 1) + image + random_text(rng, 3), 2),
            (random_text(rng, 6), 0),
            (random_text(rng, 3) + image + random_text(rng, 2), 1),
        ],
    }


@pytest.mark.parametrize("layout", layouts(np.random.default_rng(0)))
def test_logits_equal_those_of_llava(models, layout):
    llava, ours = models
    rng = np.random.default_rng(1)
    rows = layouts(rng)[layout]
    length, most = max(len(tokens) for tokens, _ in rows), max(count for _, count in rows)
    tokens = np.zeros((len(rows), length), np.int32)
    valid = np.zeros((len(rows), length), bool)
    for i, (row, _) in enumerate(rows):
        tokens[i, : len(row)] = row
        valid[i, : len(row)] = True
    images = rng.integers(0, 256, (len(rows), most, 12, 12, 3), np.uint8)
    in_order = np.concatenate([images[i, :count] for i, (_, count) in enumerate(rows)])

    with torch.no_grad():
        theirs = llava(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(valid).long(),
            pixel_values=pixel_values(in_order, TOWER),
        ).logits.numpy()
    batch = {
        "tokens": jnp.asarray(tokens),
        "positions": jnp.tile(jnp.arange(length), (len(rows), 1)),
        "segments": jnp.asarray(valid.astype(np.int32)),
        "images": jnp.asarray(images),
    }

    assert theirs.std() > 0.5
    np.testing.assert_allclose(np.asarray(ours(batch))[valid], theirs[valid], atol=1e-4)
