"""Features of CLIP-L/14-336 for two images, compared with `transformers`.

    python -m benchmarks.vision_tower [--rounds 5] [--json]

Both sides have the same random float32 weights, start with uint8 images and end with the patches of
the second-to-last layer, as in LLaVA. The last layer, which `transformers` would compute for
nothing, is deleted from its vision encoder.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import head_to_head, models

IMAGES, SIZE, IMAGE = 2, 336, 299


def random_images() -> np.ndarray:
    """Returns uint8 images [B, h, w, 3]."""
    return np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3)).astype(np.uint8)


def figures(features: np.ndarray) -> dict[str, float]:
    """Returns the standard deviation of features [B, P, D], and the norm of the first one."""
    return {"std": float(features.std()), "first": float(np.linalg.norm(features[0, 0]))}


def architecture():
    """Returns the vision encoder with a minimal decoder, since exports are complete models."""
    from moddistill.models.decoder import DecoderConfig
    from moddistill.models.presets import preset
    from moddistill.models.vlm import ModelConfig

    decoder = DecoderConfig(300, ((0, IMAGE),), 8, 8, 1, 1, 1, 8)
    return ModelConfig(decoder, preset("qwen2-0.5b").vision, "mlp2x_gelu", "chatml", IMAGE)


def make_files(folder: Path) -> None:
    config = architecture()
    models.save_both(folder, "model", config, models.random_params(config, 0))


def prepare_moddistill(folder: Path) -> Callable[[], dict[str, float]]:
    import jax

    from moddistill.models.compute import ComputeConfig
    from moddistill.models.vision import Vision
    from moddistill.storage.model_folder import load_params

    config = architecture()
    params = {"params": load_params(folder / "model", config, part="vision")["vision"]}
    params = jax.block_until_ready(params)
    tower = Vision(config.vision, ComputeConfig())
    images = jax.numpy.asarray(random_images())
    encode = jax.jit(tower.apply)
    return lambda: figures(np.asarray(encode(params, images)))


def prepare_torch(folder: Path) -> Callable[[], dict[str, float]]:
    import torch

    tower = models.load_in_torch(folder, "model").model.vision_tower.eval()
    del tower.encoder.num_layers[-1]
    images = random_images()

    def run() -> dict[str, float]:
        with torch.no_grad():
            pixels = models.clip_pixels(images)
            states = tower(pixels, output_hidden_states=True).hidden_states
        return figures(states[-1][:, 1:].numpy())

    return run


SIDES = {"moddistill": prepare_moddistill, "transformers": prepare_torch}

if __name__ == "__main__":
    head_to_head.main("benchmarks.vision_tower", __doc__)
