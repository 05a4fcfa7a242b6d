"""Model folders: architecture, parameters, tokenizer and image settings of one model.

model.json     architecture, layer plan, conversation template, source
params/        arrays; see `orbax_layout`
tokenizer.json, tokenizer_config.json, preprocessor_config.json
digests.json   SHA-256 of all these files, compared by all readers
"""

import dataclasses
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import SingleDeviceSharding
from PIL import Image

from moddistill.config import TEMPLATES
from moddistill.configdict import from_config_dict
from moddistill.distributed.processes import is_main_process
from moddistill.distributed.sharding import unbox
from moddistill.errors import UserError, invalid, not_one_of
from moddistill.models.limits import check_architecture
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import check_same, flatten, unflatten
from moddistill.storage.atomic_dir import write_shared_folder
from moddistill.storage.digests import verify
from moddistill.storage.json_file import read_json, write_json
from moddistill.storage.orbax_layout import (
    abstract_arrays,
    check_exists,
    read_arrays,
    write_arrays,
)

VERSION = 3


@runtime_checkable
class SavesFiles(Protocol):
    """A tokenizer, as far as model folders use it."""

    def save(self, folder: str) -> None: ...


def save_model(
    folder: str | Path,
    config: ModelConfig,
    params: dict[str, Any],
    tokenizer: SavesFiles,
    source: dict[str, Any],
) -> None:
    """Writes a model folder, atomically.

    All processes call this together.

    Raises:
      UserError: if the folder exists, unless this function wrote it and it is unchanged.
    """
    with write_shared_folder(Path(folder), "train") as tmp_dir:
        write_arrays(tmp_dir / "params", params)
        if is_main_process():
            write_description(tmp_dir, config, tokenizer, source)


def write_description(
    folder: Path, config: ModelConfig, tokenizer: SavesFiles, source: dict[str, Any]
) -> None:
    """Writes all files of a model folder except `params/`."""
    description = {
        "version": VERSION,
        "architecture": dataclasses.asdict(config),
        "layer_plan": [dataclasses.asdict(segment) for segment in config.decoder.plan],
        "source": source,
    }
    write_json(folder / "model.json", description)
    tokenizer.save(str(folder))
    if config.vision is not None:
        tower = config.vision
        settings = preprocessor_config(tower.image_size, tower.mean, tower.std)
        write_json(folder / "preprocessor_config.json", settings)


def read_model_config(folder: str | Path) -> ModelConfig:
    """Reads the architecture of a model folder.

    Raises:
      UserError: if this is not a model folder or of another version, or `model.json` is damaged.
    """
    description = _read_description(folder)
    origin = str(Path(folder) / "model.json")
    try:
        config = from_config_dict(ModelConfig, description["architecture"], origin)
    except UserError as error:
        # The checks of the config dataclasses themselves do not know the file.
        message = str(error)
        raise UserError(message if message.startswith(origin) else f"{origin}: {message}") from None
    check_architecture(config, origin)
    if config.template not in TEMPLATES:
        raise not_one_of(f"{origin}: template", config.template, TEMPLATES)
    return config


def read_source(folder: str | Path) -> dict[str, Any]:
    """Reads the origin of a model: the settings of its stage, or the sources of its import."""
    source = _read_description(folder)["source"]
    _check_imported(source.get("imported", {}), str(Path(folder) / "model.json"))
    return source


def _check_imported(imported: Any, origin: str) -> None:
    """Raises UserError unless the fields of `source.imported` have the types of an import."""
    is_names = lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x)  # noqa: E731
    checks = {
        "from": (is_names, "a list of names"),
        "new": (is_names, "a list of names"),
        "spelling": (lambda x: is_names(x) and len(x) == 4, "four names"),
        "weights": (lambda x: isinstance(x, str), "a digest"),
        "stored_head": (lambda x: isinstance(x, bool), "true or false"),
        "generation": (lambda x: isinstance(x, dict), "an object"),
        "replaced": (is_names, "a list of texts"),
    }
    if not isinstance(imported, dict):
        raise invalid(f"{origin}: source.imported", imported, "an object")
    for name, (is_valid, expected) in checks.items():
        if name in imported and not is_valid(imported[name]):
            raise invalid(f"{origin}: source.imported.{name}", imported[name], expected)


def _read_description(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / "model.json"
    if not file.is_file():
        raise UserError(
            "expected a model folder, as a stage or an import writes it, or a Hugging Face folder, "
            f"got {str(folder)!r} without model.json"
        )
    description = read_json(file)
    if description.get("version") != VERSION:
        raise invalid(f"{file}: version", description.get("version"), str(VERSION))
    for part in ("architecture", "source"):
        if not isinstance(description.get(part), dict):
            raise invalid(f"{file}: {part}", description.get(part), "an object")
    # Only this file: arrays are verified when they are loaded.
    verify(file.parent, [file.name])
    return description


def load_params(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: Any = None,
    shardings: dict[str, Any] | None = None,
    part: str = "",
) -> dict[str, Any]:
    """Reads the parameters of a model folder straight into their sharding and dtype.

    All files of the folder are compared with their digests first.

    Args:
      dtype: of the loaded arrays, one or a tree like the parameters; by default as stored.
      shardings: a tree like the parameters, with which all processes load together; by default
        all arrays are loaded onto the first device.
      part: the only component to load, such as `vision`; by default all.

    Raises:
      UserError: naming damaged files, or listing every parameter that is missing, unexpected or of
        another shape.
    """
    path = Path(folder) / "params"
    check_exists(path)
    verify(Path(folder), shared=shardings is not None)
    expected = flatten(unbox(abstract_params(config)))
    stored = abstract_arrays(path)
    check_same(stored, expected, str(path))
    # Orbax reads each shard straight onto its device, in the dtype of the target.
    first_device = SingleDeviceSharding(jax.devices()[0])
    sharding = flatten(shardings) if shardings else dict.fromkeys(expected, first_device)
    dtypes = flatten(dtype) if isinstance(dtype, dict) else dict.fromkeys(expected, dtype)
    target = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, dtypes[name] or stored[name].dtype, sharding=sharding[name]
        )
        for name, leaf in expected.items()
        if not part or name.split("/")[0] == part
    }
    return read_arrays(path, unflatten(target), partial=bool(part))


def preprocessor_config(
    size: int, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` with which `transformers` prepares images alike.

    The result of `transformers` is the array of `data.images`, normalised by `mean` and `std`.
    """
    return {
        "image_processor_type": "LlavaImageProcessor",
        # Padded to a square first, so that the resize gives `size` x `size`, which the crop keeps.
        "do_pad": True,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
