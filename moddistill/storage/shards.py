"""Checkpoints of one or several weight files, as tensors by name.

`open_checkpoint` reads one `.safetensors` or `.bin` file, or the shards that an index lists. Only
headers are read, so opening a checkpoint of any size takes milliseconds. `create_shards` splits the
tensors of an export over files of a limited size and writes their index.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from moddistill.errors import UserError
from moddistill.storage.json_file import read_json
from moddistill.storage.pickled import read_pickled
from moddistill.storage.safetensors import LARGEST_HEADER, create_file, read_safetensors
from moddistill.storage.tensor import (
    Checkpoint,
    Planned,
    Tensor,
    check_count,
    some_of,
)

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def open_checkpoint(folder: Path) -> Checkpoint:
    """The tensors of a folder's weight files by name.

    Raises:
      UserError: no weight file, a shard that is missing, corrupt, cut off or outside the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name)  # also beside an index, as `transformers` does
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    raise UserError(
        f"{str(folder)!r} has no weights; accepted: model.safetensors or pytorch_model.bin, whole "
        "or in shards with their index"
    )


def read_file(file: Path) -> Checkpoint:
    """The tensors of one file; safetensors by its name, otherwise a `.bin`."""
    return (read_safetensors if file.suffix == ".safetensors" else read_pickled)(file)


def _read_shards(index: Path) -> Checkpoint:
    places = _weight_map(index)
    names = sorted(set(places.values()))
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise UserError(f"{index} names {name!r:.80}, which is outside of its folder")
        if len(name) > 200 or not name.isprintable():
            raise UserError(f"{index} names {name!r:.80}; accepted: the name of a file")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index} names {len(missing)} of {len(names)} files that are missing: "
            + some_of(missing)
        )
    shards: dict[str, Checkpoint] = {}
    for name in names:
        shards[name] = read_file(index.parent / name)
        check_count(sum(len(shard) for shard in shards.values()), str(index))
    lost = sorted(tensor for tensor, shard in places.items() if tensor not in shards[shard])
    if lost:
        raise UserError(
            f"{index} places tensors in shards that do not hold them: "
            + some_of([f"{tensor} in {places[tensor]}" for tensor in lost])
        )
    beside = {name: x for shard in shards.values() for name, x in shard.items()}
    return beside | {tensor: shards[shard][tensor] for tensor, shard in places.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = read_json(index, LARGEST_HEADER).get("weight_map")
    except UserError as error:
        raise UserError(f"{index} is no index of shards: {error}") from None
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise UserError(
            f"{index} is no index of shards: its weight_map is {places!r:.80}; accepted: an object "
            "of tensors' names and files"
        )
    check_count(len(places), str(index))
    return places


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB` or `2GiB`; UserError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)", text.strip(), re.IGNORECASE)
    size = round(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise UserError(f"max_shard_size is {text!r}; accepted: a number and a unit, such as 5GB")
    return size


def create_shards(folder: Path, tensors: Sequence[Planned], largest: int) -> dict[str, Tensor]:
    """Files of at most `largest` bytes of tensors (a larger tensor has its own), still empty.

    Returns the place of each tensor; `write` fills it.
    """
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > largest:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {
                tensor.name: name
                for name, shard in zip(names, shards, strict=True)
                for tensor in shard
            },
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    places = {}
    for name, shard in zip(names, shards, strict=True):
        places |= create_file(folder / name, shard)
    return places
