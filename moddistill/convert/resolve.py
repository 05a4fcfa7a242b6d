"""Resolution of the models that settings name.

A spec is a model folder, a Hugging Face folder, a hub name, or `random:PRESET` for new weights.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moddistill.convert.cache import import_once
from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed.sharding import check_divisible, param_shardings, unbox
from moddistill.models.compute import ComputeConfig
from moddistill.models.layer_plan import separate_layers
from moddistill.models.presets import preset, with_vocabulary
from moddistill.models.vlm import ModelConfig, Vlm, abstract_params, dummy_batch
from moddistill.params import cast_frozen
from moddistill.storage.model_folder import load_params, read_model_config

RANDOM = "random:"


@dataclasses.dataclass(frozen=True)
class ResolvedModel:
    """A model that a spec names.

    Attributes:
      spec: as the user wrote it.
      folder: its model folder; None for `random:PRESET`, whose weights are initialised.
      config: its architecture.
    """

    spec: str
    folder: Path | None
    config: ModelConfig


def resolve(spec: str, tokenizer: Tokenizer | None = None) -> ResolvedModel:
    """Finds or imports the model folder of a spec and reads its architecture.

    Args:
      tokenizer: the one whose ids `random:PRESET` gets; by default those of the preset.

    Raises:
      UserError: if the spec names no model, or the tokenizer has more ids than the preset has rows.
    """
    if not spec.startswith(RANDOM):
        folder = as_model_folder(spec)
        return ResolvedModel(spec, folder, read_model_config(folder))
    config = preset(spec.removeprefix(RANDOM))
    if tokenizer is not None:
        config = with_vocabulary(config, tokenizer.real_ids, tokenizer.image_id)
    return ResolvedModel(spec, None, config)


def as_model_folder(name: str | Path) -> Path:
    """Returns the model folder of anything that names a model.

    A model folder is returned as it is. A Hugging Face folder or hub name is imported once into
    `$XDG_CACHE_HOME/moddistill` (or `~/.cache/moddistill`), and again when its files have changed.

    Raises:
      UserError: if it is none of these, or its weights cannot be imported.
    """
    folder = Path(name)
    if (folder / "model.json").is_file():
        return folder
    is_hub_name = not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name))
    if not (folder / "config.json").is_file() and not is_hub_name:
        return folder  # reading it says what is missing
    return import_once(str(name))


def load(
    folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    stacked: bool = True,
) -> tuple[Vlm, dict[str, Any]]:
    """Loads a model for inference as `(model, params)`.

    Args:
      folder: a model folder, a Hugging Face folder or a hub name.
      dtype: of computation and parameters; routers, norms and residual weights stay float32.
      mesh: devices to shard the parameters over; by default all are on the first device.
      stacked: equal layers share arrays, as they are stored. Answers are made faster without.

    Raises:
      UserError: if it is none of these, its parameters do not fit its architecture, or the mesh
        does not divide them.
    """
    folder = as_model_folder(folder)
    config = read_model_config(folder)
    boxed = abstract_params(config)
    shardings = None
    if mesh is not None:
        check_divisible(mesh, boxed, "model")
        shardings = param_shardings(mesh, boxed)
    # Evaluated on shapes, `cast_frozen` gives the dtype of each array before any is read.
    shapes = jax.eval_shape(lambda params: cast_frozen(params, dtype), unbox(boxed))
    dtypes = jax.tree.map(lambda x: x.dtype, shapes)
    params = load_params(folder, config, dtype=dtypes, shardings=shardings)
    if not stacked:
        params["decoder"] = _separate(params["decoder"], config)
    return Vlm(config, ComputeConfig(dtype=dtype, stacked=stacked)), params


def _separate(decoder: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    layers = separate_layers(decoder, config.decoder.plan)
    return layers | {name: x for name, x in decoder.items() if not name.startswith("segment_")}


def load_or_init(model: ResolvedModel, mesh: Mesh, rng: jax.Array) -> dict[str, Any]:
    """Parameters of a model, sharded over the mesh: as stored in its folder, or new ones."""
    if model.folder is None:
        return random_params(model.config, mesh, rng)
    shardings = param_shardings(mesh, abstract_params(model.config))
    return load_params(model.folder, model.config, shardings=shardings)


def random_params(config: ModelConfig, mesh: Mesh, rng: jax.Array) -> dict[str, Any]:
    """New float32 parameters, initialised in their shards."""
    shardings = param_shardings(mesh, abstract_params(config))

    def init(rng: jax.Array) -> dict[str, Any]:
        return unbox(Vlm(config).init(rng, dummy_batch(config)))["params"]

    # With `out_shardings`, no device ever holds an array in full.
    return jax.jit(init, out_shardings=shardings)(rng)
