"""Writes safetensors: every tensor at its final place, in any order, one at a time in memory."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moddistill.storage.safetensors import DTYPES, Tensor

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor that is going to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB` or `2GiB`; ValueError for another text."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)", text.strip(), re.IGNORECASE)
    size = round(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ValueError(f"max_shard_size is {text!r}; accepted: a number and a unit, such as 5GB")
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


def write(place: Tensor, array: np.ndarray, origin: str = "") -> None:
    """Puts an array of the planned shape into its place, in the planned dtype.

    Args:
      origin: folder and name of the tensor, for errors; by default the file that is written.

    Raises:
      ValueError: if the array has another shape, or a number that is too large for the dtype.
    """
    origin = origin or str(place.file)
    if array.shape != place.shape:
        raise ValueError(f"{origin}: {array.shape} was given for {place.shape}")
    with np.errstate(over="ignore"):
        written = array.astype(place.dtype, copy=False)
    if array.dtype != place.dtype and np.any(np.isinf(written) & np.isfinite(array)):
        accepted = "bfloat16 or float32" if place.dtype == np.float16 else "float32"
        largest = float(np.abs(array[np.isfinite(array)]).max())
        raise ValueError(
            f"{origin} has the number {largest:.4g}, which is too large for {place.dtype}; "
            f"accepted: {accepted}"
        )
    place.map("r+")[...] = written


def create_file(file: Path, tensors: Sequence[Planned]) -> dict[str, Tensor]:
    """One file, whose tensors are zero until they are written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if hasattr(os, "posix_fallocate"):
            # A page of a file with holes that a full disk cannot back kills the process.
            os.posix_fallocate(stream.fileno(), 0, start + position)
        else:  # macOS
            stream.truncate(start + position)
    return {
        tensor.name: Tensor(
            file, start + header[tensor.name]["data_offsets"][0], tensor.dtype, tensor.shape
        )
        for tensor in tensors
    }
