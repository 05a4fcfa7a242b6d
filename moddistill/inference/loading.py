"""Loading of a model that writes answers."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from moddistill.convert.resolve import as_model_folder, load
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.models.vlm import Vlm


class Loaded(NamedTuple):
    """A model that writes answers: the first arguments of `generation.generate`."""

    model: Vlm
    params: dict[str, Any]
    tokenizer: Tokenizer


def load_with_tokenizer(
    source: str | Path, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> Loaded:
    """Loads a model folder, a Hugging Face folder or a hub name.

    Args:
      dtype: of parameters, computation and cache.
      mesh: devices to shard the parameters over; by default the first device.
    """
    folder = as_model_folder(source)
    loaded = load(folder, dtype=jnp.dtype(dtype), mesh=mesh, stacked=False)
    return Loaded(*loaded, load_tokenizer(str(folder)))
