"""Features of CLIP-L/14-336 for two pictures, random weights, against `transformers`. float32.

python -m benchmarks.vision_tower [--rounds 5] [--json]
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import head_to_head

IMAGES, SIZE = 2, 336


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3)).astype(np.uint8)


def ours(_: Path) -> Callable[[], None]:
    import jax

    from moddistill.models.presets import preset
    from moddistill.models.vision import Vision

    tower = Vision(preset("qwen2-0.5b").vision, jax.numpy.float32, remat="none")
    images = jax.numpy.asarray(pictures())
    params = jax.jit(tower.init)(jax.random.key(0), images)
    see = jax.jit(tower.apply)
    return lambda: jax.block_until_ready(see(params, images))


def theirs(_: Path) -> Callable[[], None]:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=SIZE,
        patch_size=14,
        projection_dim=768,
    )
    tower = CLIPVisionModel(config).eval()
    pixels = torch.from_numpy(pictures()).permute(0, 3, 1, 2) / 255

    def run() -> None:
        with torch.no_grad():
            tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    return run


SIDES = {"moddistill": ours, "transformers": theirs}

if __name__ == "__main__":
    head_to_head.main("benchmarks.vision_tower", __doc__)
