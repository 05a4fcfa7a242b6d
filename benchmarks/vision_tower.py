"""Features of CLIP-L/14-336 for two pictures, same random weights, against `transformers`. float32.

    python -m benchmarks.vision_tower [--rounds 5] [--json]

Both begin with pictures in uint8 and end with the patches of the layer before the last, LLaVA's.
The last layer, which `transformers` would compute, is taken from its tower.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import head_to_head, models

IMAGES, SIZE, IMAGE = 2, 336, 299


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3)).astype(np.uint8)


def figures(features: np.ndarray) -> dict[str, float]:
    """Of features [B, P, D]: their spread, and the first one's length."""
    return {"spread": float(features.std()), "first": float(np.linalg.norm(features[0, 0]))}


def architecture():
    """The tower before the smallest decoder, which makes of both a model in either format."""
    from moddistill.models.decoder import DecoderConfig
    from moddistill.models.presets import preset
    from moddistill.models.vlm import ModelConfig

    decoder = DecoderConfig(300, 300, 8, 8, 1, 1, 1, 8)
    return ModelConfig(decoder, preset("qwen2-0.5b").vision, "mlp2x_gelu", "chatml", IMAGE)


def make_files(folder: Path) -> None:
    config = architecture()
    models.save_both(folder, "model", config, models.random_params(config, 0))


def ours(folder: Path) -> Callable[[], dict[str, float]]:
    import jax

    from moddistill.models.compute import ComputeConfig
    from moddistill.models.vision import Vision
    from moddistill.storage.model_folder import load_params

    config = architecture()
    params = {"params": load_params(folder / "model", config, part="vision")["vision"]}
    params = jax.block_until_ready(params)
    tower = Vision(config.vision, ComputeConfig())
    images = jax.numpy.asarray(pictures())
    see = jax.jit(tower.apply)
    return lambda: figures(np.asarray(see(params, images)))


def theirs(folder: Path) -> Callable[[], dict[str, float]]:
    import torch

    tower = models.load_in_torch(folder, "model").model.vision_tower.eval()
    del tower.encoder.layers[-1]
    images = pictures()

    def run() -> dict[str, float]:
        with torch.no_grad():
            pixels = models.clip_pixels(images)
            states = tower(pixels, output_hidden_states=True).hidden_states
        return figures(states[-1][:, 1:].numpy())

    return run


SIDES = {"moddistill": ours, "transformers": theirs}

if __name__ == "__main__":
    head_to_head.main("benchmarks.vision_tower", __doc__)
