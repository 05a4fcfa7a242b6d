"""Features of CLIP-L/14-336 for two pictures, same random weights, against `transformers`. float32.

    python -m benchmarks.vision_tower [--rounds 5] [--json]

Both begin with pictures in uint8 and end with the patches of the layer before the last, LLaVA's.
The last layer, which `transformers` would compute, is taken from its tower.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import head_to_head

IMAGES, SIZE, IMAGE = 2, 336, 299


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3)).astype(np.uint8)


def figures(features: np.ndarray) -> dict[str, float]:
    """Of features [B, P, D]: their spread, and the first one's length."""
    return {"spread": float(features.std()), "first": float(np.linalg.norm(features[0, 0]))}


def architecture():
    """The tower before the smallest decoder, which makes of both a model in either format."""
    from moddistill.models.presets import preset
    from moddistill.models.qwen import DecoderConfig
    from moddistill.models.vlm import ModelConfig

    decoder = DecoderConfig(300, 300, 8, 8, 1, 1, 1, 8)
    return ModelConfig(decoder, preset("qwen2-0.5b").vision, "mlp2x_gelu", "chatml", IMAGE)


def make_files(folder: Path) -> None:
    """Random weights in our format and, exported, in that of `transformers`."""
    import jax

    from moddistill.data.tokenizer import train_bpe
    from moddistill.model_folder import save_model
    from moddistill.models.vlm import Vlm, dummy_batch
    from moddistill.sharding import unbox
    from tools.convert_weights.export import export_model

    config = architecture()
    init = jax.jit(lambda rng: Vlm(config).init(rng, dummy_batch(config)))
    params = unbox(init(jax.random.key(0)))["params"]
    save_model(folder / "model", config, params, train_bpe(["a small tokenizer"], 300), {})
    export_model(folder / "model", folder / "hf", max_shard_size=10**10)


def ours(folder: Path) -> Callable[[], dict[str, float]]:
    import jax

    from moddistill.model_folder import load_params
    from moddistill.models.vision import Vision

    config = architecture()
    params = {"params": load_params(folder / "model", config, part="vision")["vision"]}
    params = jax.block_until_ready(params)
    tower = Vision(config.vision, jax.numpy.float32, remat="none")
    images = jax.numpy.asarray(pictures())
    see = jax.jit(tower.apply)
    return lambda: figures(np.asarray(see(params, images)))


def theirs(folder: Path) -> Callable[[], dict[str, float]]:
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder / "hf", dtype=torch.float32)
    tower = copy.deepcopy(model.model.vision_tower).eval()  # in memory, not in a file
    del tower.encoder.layers[-1]
    images = torch.from_numpy(pictures())
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])

    def run() -> dict[str, float]:
        with torch.no_grad():
            pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
            states = tower(pixels, output_hidden_states=True).hidden_states
        return figures(states[-1][:, 1:].numpy())

    return run


SIDES = {"moddistill": ours, "transformers": theirs}

if __name__ == "__main__":
    head_to_head.main("benchmarks.vision_tower", __doc__)
