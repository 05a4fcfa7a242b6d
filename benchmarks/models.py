"""Models of random weights that both sides of a benchmark load, each in its own format."""

import copy
from pathlib import Path
from typing import Any

import numpy as np


def random_params(config: Any, seed: int) -> dict[str, Any]:
    import jax

    from moddistill.config import MeshConfig
    from moddistill.convert.resolve import random_params as init
    from moddistill.distributed.sharding import make_mesh

    return init(config, make_mesh(MeshConfig()), jax.random.key(seed))


def save_both(folder: Path, name: str, config: Any, params: dict[str, Any]) -> None:
    """A model folder `name` and, exported, `name`-hf in the format of `transformers`."""
    from moddistill.convert.exporting import export_model
    from moddistill.data.tokenizer import train_bpe
    from moddistill.storage.model_folder import save_model

    save_model(folder / name, config, params, train_bpe(["a small tokenizer"], 300), {})
    export_model(folder / name, folder / f"{name}-hf", max_shard_size=10**10)


def load_in_torch(folder: Path, name: str) -> Any:
    """The exported model in float32, in memory and not in its file."""
    import torch
    from transformers import AutoModelForImageTextToText

    load = AutoModelForImageTextToText.from_pretrained
    return copy.deepcopy(load(folder / f"{name}-hf", dtype=torch.float32))


def clip_pixels(images: np.ndarray) -> Any:
    """Of images [B, h, w, 3] in uint8, what CLIP's tower takes in torch: [B, 3, h, w].

    The numbers of `VisionConfig`, which torch's side does not import: it would bring JAX along.
    """
    import torch

    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (torch.from_numpy(images) / 255 - mean) / std
    return pixels.permute(0, 3, 1, 2).contiguous()
