"""Expert load of a sparse model over the prompts of a task."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moddistill.data.tokenizer import Tokenizer
from moddistill.inference.decode import without_drops
from moddistill.inference.prompts import Prompt, prompt_batch
from moddistill.models.vlm import Vlm


def expert_load(
    model: Vlm, params: dict[str, Any], tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[dict[str, Any]]:
    """Returns each expert's share of assignments, by layer and modality, over prompt tokens.

    Returns:
      `{"layer": index, "image": shares, "text": shares}` for each expert layer; shares add up to 1.
    """
    batch = prompt_batch(prompts, model.config, tokenizer)
    model = without_drops(model)
    load_of = jax.jit(lambda params, batch: model.apply({"params": params}, batch).router.load)
    text, image = np.moveaxis(np.asarray(load_of(params, batch)), 1, 0)
    layers = model.config.decoder.moe_layers
    return [
        {"layer": layer, "image": _shares(image[i]), "text": _shares(text[i])}
        for i, layer in enumerate(layers)
    ]


def _shares(load: np.ndarray) -> list[float]:
    return (load / max(load.sum(), 1.0)).tolist()
