import dataclasses

import jax
import numpy as np
import pytest
from transformers import LlavaConfig, LlavaForConditionalGeneration

from moddistill.models.batch import padded_batch
from moddistill.models.decoder import DecoderConfig
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig, Vlm
from tests import torch_or_skip as torch
from tests.parity.convert import model_params, numpy_state, pixel_values, randomise
from tests.parity.test_clip import clip_config
from tests.parity.test_qwen import qwen2_config
from tests.parity.test_siglip import TWO_BY_TWO, siglip_config

IMAGE = 96
PATCHES = 4
CLIP = VisionConfig(
    image_size=12, patch_size=6, hidden_size=24, intermediate_size=48, num_layers=3, num_heads=3
)
SIGLIP = dataclasses.replace(
    TWO_BY_TWO,
    image_size=13,
    patch_size=6,
    hidden_size=24,
    intermediate_size=48,
    num_layers=3,
    num_heads=3,
)
DECODER = DecoderConfig(
    vocab_size=97,
    real_ids=((0, 96),),
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)


MODELS = {
    "CLIP, tied head": (CLIP, True),
    "CLIP, untied head": (CLIP, False),
    "SigLIP, tied head": (SIGLIP, True),
}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def models(request):
    """A torch LLaVA and ours with the same weights, and their tower's config."""
    tower, tied_head = request.param
    decoder = dataclasses.replace(DECODER, tie_word_embeddings=tied_head)
    config = ModelConfig(decoder, tower, "mlp2x_gelu", "vicuna", IMAGE)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=clip_config(tower) if tower is CLIP else siglip_config(tower),
            text_config=qwen2_config(decoder),
            image_token_index=IMAGE,
            vision_feature_layer=tower.select_layer,
            vision_feature_select_strategy="default" if tower.class_token else "full",
            tie_word_embeddings=decoder.tie_word_embeddings,
        )
    )
    randomise(llava)
    params = model_params(numpy_state(llava), config)
    ours = jax.jit(lambda batch: Vlm.logits(Vlm(config).apply({"params": params}, batch)))
    return llava, ours, tower


def random_text(rng, length):
    return rng.integers(0, IMAGE, length).tolist()


def layouts(rng):
    """Rows of tokens, each with its number of images; an image takes four positions."""
    image = [IMAGE] * PATCHES
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
    llava, ours, tower = models
    rng = np.random.default_rng(1)
    rows = layouts(rng)[layout]
    length, most = max(len(tokens) for tokens, _ in rows), max(count for _, count in rows)
    tokens = np.zeros((len(rows), length), np.int32)
    valid = np.zeros((len(rows), length), bool)
    for i, (row, _) in enumerate(rows):
        tokens[i, : len(row)] = row
        valid[i, : len(row)] = True
    size = tower.image_size
    images = rng.integers(0, 256, (len(rows), most, size, size, 3), np.uint8)
    in_order = np.concatenate([images[i, :count] for i, (_, count) in enumerate(rows)])

    with torch.no_grad():
        theirs = llava(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(valid).long(),
            pixel_values=pixel_values(in_order, tower),
        ).logits.numpy()
    batch = padded_batch(tokens, valid.sum(axis=1), images=images)

    assert theirs.std() > 0.5
    np.testing.assert_allclose(np.asarray(ours(batch))[valid], theirs[valid], atol=1e-4)
