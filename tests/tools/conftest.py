import jax
import numpy as np
import pytest
import torch

from moddistill.data.tokenizer import train_bpe
from moddistill.model_folder import load
from moddistill.models.vlm import Vlm


@pytest.fixture(scope="session")
def small_tokenizer():
    """300 ids or a few fewer, and `<image>` behind them."""
    return train_bpe(["what colour is the shape? a red circle, no triangle. yes no " * 3], 300)


@pytest.fixture(scope="session")
def torch_logits():
    """`torch_logits(model, tokens, images, config)`: float32 logits of a torch model."""

    def compute(model, tokens, images=None, config=None):
        inputs = {"input_ids": torch.tensor(tokens).long()}
        if images is not None:
            scaled = images[:, 0].astype(np.float64) / 255
            normal = (scaled - np.array(config.vision.mean)) / np.array(config.vision.std)
            inputs["pixel_values"] = torch.tensor(normal.transpose(0, 3, 1, 2)).float()
        with torch.no_grad():
            return model(**inputs).logits.numpy()

    return compute


@pytest.fixture(scope="session")
def our_logits():
    """`our_logits(folder, tokens, images)`: those of a model folder."""

    def compute(folder, tokens, images=None):
        model, params = load(folder)
        batch = {
            "tokens": np.asarray(tokens, np.int32),
            "positions": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
            "segments": np.ones(tokens.shape, np.int32),
        }
        batch |= {} if images is None else {"images": images}
        return np.asarray(
            jax.jit(lambda p, b: Vlm.logits(model.apply({"params": p}, b)))(params, batch)
        )

    return compute


@pytest.fixture(scope="session")
def random_inputs():
    """`random_inputs(config)`: two rows of tokens, each with a picture if the model sees."""

    def make(config, length=9):
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, config.decoder.real_ids[-1][1], (2, length), np.int32)
        if config.vision is None:
            return tokens, None
        patches = np.full((2, config.vision.patches), config.image_token, np.int32)
        size = config.vision.image_size
        images = rng.integers(0, 256, (2, 1, size, size, 3), np.uint8)
        return np.concatenate([tokens[:, :3], patches, tokens[:, 3:]], axis=1), images

    return make
