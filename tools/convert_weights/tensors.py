"""Checkpoints as names and arrays that are read when they are wanted.

One `.safetensors` file, several with an index, or the same of PyTorch's `.bin`. Nothing but headers
is read on opening, so a checkpoint of any size is looked through in milliseconds.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_LARGEST_HEADER = 100_000_000  # bytes, the limit of the format

Checkpoint = Mapping[str, "Tensor"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where the bytes of an array lie: little-endian, the last axis fastest."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array, as the file's pages: they come with their use and go with the array."""
        return self.map("r")

    def map(self, mode: Literal["r", "r+"]) -> np.ndarray:
        """The array's bytes in the file; with `r+`, what is assigned to it is written there."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        if self.offset + self.nbytes > (size := self.file.stat().st_size):
            raise ValueError(
                f"{self.file} is cut off: {self.nbytes} bytes are wanted at offset {self.offset}, "
                f"the file has {size}"
            )
        data = np.memmap(self.file, np.uint8, mode, self.offset, (self.nbytes,))
        return np.asarray(data).view(self.dtype).reshape(self.shape)

    def rows(self, part: slice) -> "Tensor":
        """A range of the first axis."""
        start, stop, _ = part.indices(self.shape[0])
        skipped = start * (self.nbytes // self.shape[0])
        shape = (stop - start, *self.shape[1:])
        return dataclasses.replace(self, offset=self.offset + skipped, shape=shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The tensors of a folder's weight files by name.

    Raises:
      ValueError: no weight file, a shard that is missing, corrupt, cut off or outside the folder.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name)  # also beside an index, as `transformers` does
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    raise ValueError(
        f"{str(folder)!r} has no weights; accepted: model.safetensors or pytorch_model.bin, whole "
        "or in shards with their index"
    )


def read_file(file: Path) -> Checkpoint:
    """The tensors of one file; safetensors by its name, otherwise a `.bin`."""
    # Later, for that file imports this one's `Tensor`.
    from tools.convert_weights.pickled import read_pickled  # noqa: PLC0415

    return (read_safetensors if file.suffix == ".safetensors" else read_pickled)(file)


def _read_shards(index: Path) -> Checkpoint:
    places = _weight_map(index)
    names = sorted(set(places.values()))
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"{index} names {name!r}, which is outside of its folder")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{index} names {len(missing)} of {len(names)} files that are missing: "
            + ", ".join(missing)
        )
    shards = {name: read_file(index.parent / name) for name in names}
    lost = sorted(tensor for tensor, shard in places.items() if tensor not in shards[shard])
    if lost:
        raise ValueError(
            f"{index} places tensors in shards that do not hold them: "
            + ", ".join(f"{tensor} in {places[tensor]}" for tensor in lost[:5])
            + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        )
    beside = {name: x for shard in shards.values() for name, x in shard.items()}
    return beside | {tensor: shards[shard][tensor] for tensor, shard in places.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(item, str) for pair in places.items() for item in pair):
            raise TypeError("names are texts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of shards: {error!r}") from None
    return places


def read_safetensors(file: Path) -> Checkpoint:
    """The tensors of one file, whose header is checked against its length.

    Raises:
      ValueError: naming the file and the byte offset where it is wrong.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(
                f"{file} is no whole safetensors file: at offset 0 a header of {length} bytes is "
                f"announced, the file has {size}"
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _tensor(file, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: broken header at offset 8: {error}") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            raise ValueError(f"{file}: {name} begins at offset {tensor.offset}, expected {end}")
        end += tensor.nbytes
        if end > size:
            raise ValueError(f"{file} is cut off: {name} ends at offset {end}, the file at {size}")
    if end != size:
        raise ValueError(f"{file}: its tensors end at offset {end}, the file at {size}")
    return tensors


def _tensor(file: Path, start: int, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is unknown; accepted: {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    for number in (begin, end, *entry["shape"]):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} in a shape or an offset; accepted: a whole number from 0")
    tensor = Tensor(file, start + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    if end - begin != tensor.nbytes:
        raise ValueError(f"{end - begin} bytes for shape {tensor.shape} of {entry['dtype']}")
    return tensor
