"""Model folders: architecture, parameters, tokenizer and image settings of one model.

model.json               architecture, layer plan, conversation template, where it came from
params/                  Orbax
tokenizer.json, tokenizer_config.json, preprocessor_config.json
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from moddistill.config import from_config_dict
from moddistill.data.images import preprocessor_config
from moddistill.data.tokenizer import Tokenizer
from moddistill.models.vlm import ModelConfig, Vlm, dummy_batch
from moddistill.sharding import unbox
from moddistill.tree import check_same, flatten, unflatten

VERSION = 1


def save_model(
    folder: str | Path,
    config: ModelConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    source: dict[str, Any],
) -> None:
    """Writes a model folder aside and renames it, so that an interrupted write leaves none."""
    folder = Path(folder)
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    ocp.save(aside.resolve() / "params", params)
    description = {
        "version": VERSION,
        "architecture": dataclasses.asdict(config),
        "layer_plan": [dataclasses.asdict(segment) for segment in config.decoder.plan],
        "source": source,
    }
    (aside / "model.json").write_text(json.dumps(description, indent=2) + "\n")
    tokenizer.save(str(aside))
    if config.vision is not None:
        settings = preprocessor_config(config.vision.image_size)
        (aside / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def read_model_config(folder: str | Path) -> ModelConfig:
    """The architecture of a model folder; ValueError if it is none, or of another version."""
    file = Path(folder) / "model.json"
    if not file.is_file():
        raise ValueError(
            f"{str(folder)!r} is not a model folder: it has no model.json; accepted: the `model/` "
            "folder that a stage writes, or `random:PRESET` for new weights"
        )
    description = json.loads(file.read_text())
    if description.get("version") != VERSION:
        raise ValueError(
            f"{file} has version {description.get('version')!r}; this release reads {VERSION}"
        )
    return from_config_dict(ModelConfig, description["architecture"], str(file))


def abstract_params(config: ModelConfig) -> Any:
    """Shapes of all parameters, as a nested dict whose leaves carry logical axis names."""
    model = Vlm(config)
    return jax.eval_shape(model.init, jax.random.key(0), dummy_batch(config))["params"]


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Parameters stored, and those that one token uses: of the experts, the `top_k` chosen."""
    flat = flatten(unbox(abstract_params(config)))
    total = sum(leaf.size for leaf in flat.values())
    experts = sum(leaf.size for path, leaf in flat.items() if "/experts_" in path)
    moe = config.decoder.moe
    idle = experts * (moe.num_experts - moe.top_k) // moe.num_experts if moe else 0
    return total, total - idle


def load_params(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: Any = None,
    shardings: dict[str, Any] | None = None,
    part: str = "",
) -> dict[str, Any]:
    """Parameters of a model folder, read straight into their sharding and dtype.

    Args:
      dtype: of the loaded arrays; as stored if None.
      shardings: a tree like the parameters; the first device alone if absent.
      part: first path component to load alone, such as `vision`.

    Raises:
      ValueError: listing every parameter that is missing, unexpected or of another shape.
    """
    path = Path(folder).resolve() / "params"
    expected = flatten(unbox(abstract_params(config)))
    found = flatten(ocp.metadata(path).metadata)
    check_same(found, expected, str(path))
    single = SingleDeviceSharding(jax.devices()[0])
    places = flatten(shardings) if shardings else dict.fromkeys(expected, single)
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype or found[name].dtype, sharding=places[name])
        for name, leaf in expected.items()
        if not part or name.split("/")[0] == part
    }
    context = ocp.Context()
    context.pytree.loading.partial_load = bool(part)
    with context:
        return ocp.load(path, unflatten(wanted))


def load(folder: str | Path) -> tuple[Vlm, dict[str, Any]]:
    """A model folder as `(model, params)`, all in float32 on the first device.

    Raises:
      ValueError: if the folder is no model folder or its parameters do not fit its architecture.
    """
    config = read_model_config(folder)
    return Vlm(config), load_params(folder, config, dtype=jnp.float32)
