"""Reads and writes checkpoints of one or several weight files, as tensors by name.

`open_checkpoint` reads one `.safetensors` or `.bin` file, or the shards that an index lists. Only
headers are read, so opening a checkpoint of any size takes milliseconds. `create_shards` splits the
tensors of an export over files of a limited size and writes their index.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from moddistill.errors import UserError, invalid
from moddistill.storage.json_file import read_json, write_json
from moddistill.storage.pickled import read_pickled
from moddistill.storage.safetensors import LARGEST_HEADER, create_file, read_safetensors
from moddistill.storage.tensor import (
    Checkpoint,
    Tensor,
    TensorSpec,
    check_count,
    check_names,
    some_of,
)

_LARGEST_SIZE = 2**60  # bytes of a file
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a folder's weight files.

    Raises:
      UserError: if there is no weight file, or a shard is missing, corrupt, truncated or outside
        of the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name)  # also next to an index, as `transformers` does
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    raise UserError(
        f"{str(folder)!r}: expected model.safetensors or pytorch_model.bin, in one file or in "
        "shards with their index, got no weights"
    )


def read_file(file: Path) -> Checkpoint:
    """Reads the header of one file: safetensors if named so, otherwise a `.bin`."""
    return (read_safetensors if file.suffix == ".safetensors" else read_pickled)(file)


def _read_shards(index: Path) -> Checkpoint:
    shard_of = _weight_map(index)
    names = sorted(set(shard_of.values()))
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise invalid(str(index), name, "shards in its folder")
        if len(name) > 200 or not name.isprintable():
            raise invalid(str(index), name, "names of files")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index}: expected {len(names)} shards, got {len(names) - len(missing)}; missing: "
            + some_of(missing)
        )
    shards: dict[str, Checkpoint] = {}
    for name in names:
        shards[name] = read_file(index.parent / name)
        check_count(sum(len(shard) for shard in shards.values()), str(index))
    absent = sorted(tensor for tensor, shard in shard_of.items() if tensor not in shards[shard])
    if absent:
        raise UserError(
            f"{index}: expected tensors in their shards, got shards without them: "
            + some_of([f"{tensor} in {shard_of[tensor]}" for tensor in absent])
        )
    # Tensors that the index does not list are included, so that the importer can refuse them.
    unlisted = {name: x for shard in shards.values() for name, x in shard.items()}
    return unlisted | {tensor: shards[shard][tensor] for tensor, shard in shard_of.items()}


def _weight_map(index: Path) -> dict[str, str]:
    shard_of = read_json(index, LARGEST_HEADER).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(x, str) for x in shard_of.values()):
        raise invalid(f"{index}: weight_map", shard_of, "an object of tensor names and their files")
    check_names(shard_of, str(index))
    return shard_of


def parse_size(text: str) -> int:
    """Returns the bytes of `5GB`, `500MB` or `2GiB`; UserError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)", text.strip(), re.IGNORECASE)
    size = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if not 1 <= size <= _LARGEST_SIZE:
        raise invalid("max_shard_size", text, "a number and a unit, such as 5GB")
    return round(size)


def create_shards(folder: Path, tensors: Sequence[TensorSpec], largest: int) -> dict[str, Tensor]:
    """Creates files of at most `largest` bytes of tensors; a larger tensor has its own file.

    Returns the tensors by name, which are zero until `write` fills them.
    """
    shards: list[list[TensorSpec]] = [[]]
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
        write_json(folder / "model.safetensors.index.json", index)
    created = {}
    for name, shard in zip(names, shards, strict=True):
        created |= create_file(folder / name, shard)
    return created
