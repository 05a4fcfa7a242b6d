"""Models with random weights, saved in the formats of both sides of a benchmark."""

import copy
from pathlib import Path
from typing import Any

import numpy as np


def random_params(config: Any, seed: int) -> dict[str, Any]:
    """Returns random float32 parameters of an architecture."""
    import jax

    from moddistill.config import MeshConfig
    from moddistill.convert.resolve import random_params as init
    from moddistill.distributed.sharding import make_mesh

    return init(config, make_mesh(MeshConfig()), jax.random.key(seed))


def small_tower(image_size: int) -> Any:
    """Returns a vision encoder of 6 layers with patches of 14 pixels."""
    from moddistill.models.vision import VisionConfig

    return VisionConfig(
        image_size=image_size,
        patch_size=14,
        hidden_size=256,
        intermediate_size=1024,
        num_layers=6,
        num_heads=4,
        select_layer=-2,
    )


def save_both(
    folder: Path, name: str, config: Any, params: dict[str, Any], tokenizer: Any = None
) -> None:
    """Writes a model folder `name` and its export for `transformers`, `name`-hf.

    Without a tokenizer the models have a small one.
    """
    from moddistill.convert.exporting import export_model
    from moddistill.data.tokenizer import train_bpe
    from moddistill.storage.model_folder import save_model

    tokenizer = tokenizer or train_bpe(["a small tokenizer"], 300)
    save_model(folder / name, config, params, tokenizer, {})
    # Padded, so that both sides compute as many logits.
    options = {"max_shard_size": 10**10, "vocabulary": "padded"}
    export_model(folder / name, folder / f"{name}-hf", **options)


def load_in_torch(folder: Path, name: str) -> Any:
    """Loads the export in float32; the copy makes sure that no weight is a memory-mapped file."""
    import torch
    from transformers import AutoModelForImageTextToText

    load = AutoModelForImageTextToText.from_pretrained
    return copy.deepcopy(load(folder / f"{name}-hf", dtype=torch.float32))


def clip_pixels(images: np.ndarray) -> Any:
    """Converts uint8 images [B, h, w, 3] to the normalised input of CLIP in torch [B, 3, h, w].

    Mean and standard deviation are those of `VisionConfig`, which is not imported since that would
    load JAX in torch's process.
    """
    import torch

    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (torch.from_numpy(images) / 255 - mean) / std
    return pixels.permute(0, 3, 1, 2).contiguous()
