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
from moddistill.inference.prompts import Prompt, prompt_batch
from moddistill.models.vlm import Vlm


def expert_load(
    model: Vlm, params: dict[str, Any], tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """Returns each expert's share of assignments, by layer and modality, over prompt tokens.

    Returns:
      `{"layer": index, "image": shares, "text": shares}` for each expert layer; shares add up to 1.
    """
    mesh = params_mesh(params)
    rows = batch_rows(model, params, tokenizer, prompts, 0)
    # `load` counts computed assignments only: with drops, overfull experts would look balanced.
    model = without_drops(model)
    load_of = jax.jit(
        lambda params, batch: model.apply({"params": params}, batch).router.load,
        out_shardings=replicated(mesh) if mesh else None,
    )
    # Loads are counts of assignments, so that batches of any size add up to the same numbers.
    load = 0.0
    for start in range(0, len(prompts), rows):
        part = list(prompts[start : start + rows])
        batch = prompt_batch(part + part[:1] * (rows - len(part)), model.config, tokenizer)
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
