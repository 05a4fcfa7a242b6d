"""Expert load of a sparse model over the prompts of a task."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed.sharding import replicated
from moddistill.inference.batching import batch_rows
from moddistill.inference.decode import without_drops
from moddistill.inference.placement import mesh_context, params_mesh, put_rows
from moddistill.inference.prompts import (
    Prompt,
    bucket,
    encode_prompt,
    load_images,
    prompt_batch,
)
from moddistill.models.vlm import Vlm

LOAD_SAMPLES = 512  # prompts of a task that are measured


def expert_load(
    model: Vlm, params: dict[str, Any], tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """Returns each expert's share of assignments, by layer and modality, over prompt tokens.

    Returns:
      `{"layer": index, "image": shares, "text": shares}` for each expert layer; shares add up to 1.
    """
    mesh = params_mesh(params)
    ids = [encode_prompt(prompt, model.config, tokenizer) for prompt in prompts]
    rows = batch_rows(model, params, bucket(max(map(len, ids))), len(prompts))
    # `load` counts computed assignments only: with drops, overfull experts would look balanced.
    model = without_drops(model)
    load_of = jax.jit(
        lambda params, batch: model.apply({"params": params}, batch).router.load,
        out_shardings=replicated(mesh) if mesh else None,
    )
    # Loads are counts of assignments, so that batches of any size add up to the same numbers.
    load = 0.0
    for start in range(0, len(prompts), rows):
        part = range(start, min(start + rows, len(prompts)))
        filled = [*part, *[start] * (rows - len(part))]
        images = [load_images(prompts[number], model.config.vision) for number in filled]
        batch = prompt_batch([ids[number] for number in filled], images, tokenizer.pad_id)
        batch.segments[len(part) :] = 0  # padding is not routed
        with mesh_context(mesh):
            load = load + np.asarray(load_of(params, put_rows(mesh, batch)))
    # [layers, modality, experts] to [modality, layers, experts].
    text, image = np.moveaxis(load, 1, 0)
    layers = model.config.decoder.moe_layers
    return [
        {"layer": layer, "image": _shares(image[i]), "text": _shares(text[i])}
        for i, layer in enumerate(layers)
    ]


def _shares(load: np.ndarray) -> list[float]:
    return (load / max(load.sum(), 1.0)).tolist()
