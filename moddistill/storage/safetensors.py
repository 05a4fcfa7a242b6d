"""Checkpoints as names and arrays that are read when they are wanted.

One `.safetensors` file, several with an index, or the same of PyTorch's `.bin`. Nothing but headers
is read on opening, so a checkpoint of any size is looked through in milliseconds.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import ml_dtypes
import numpy as np

from moddistill.storage.json_file import read_json

# Names of the format; those of quantised weights too, so that they can be refused by name.
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
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_ACCEPTED = "float32, bfloat16 or float16, such as the bfloat16 release"
_SUBBYTE = ("F4", "F6_E2M3", "F6_E3M2")  # whose numbers share bytes
WEIGHTS = tuple(DTYPES[name] for name in ("F32", "BF16", "F16"))
# Bytes; the format allows six times as many, a file of 100,000 tensors has 12 MB.
LARGEST_HEADER = 16 * 2**20
_LARGEST_AXIS = 2**40
_MOST_AXES = 8
_MOST_TENSORS = 100_000  # of a checkpoint

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
    from moddistill.storage.pickled import read_pickled  # noqa: PLC0415

    return (read_safetensors if file.suffix == ".safetensors" else read_pickled)(file)


def _read_shards(index: Path) -> Checkpoint:
    places = _weight_map(index)
    names = sorted(set(places.values()))
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"{index} names {name!r:.80}, which is outside of its folder")
        if len(name) > 200 or not name.isprintable():
            raise ValueError(f"{index} names {name!r:.80}; accepted: the name of a file")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{index} names {len(missing)} of {len(names)} files that are missing: "
            + some_of(missing)
        )
    shards: dict[str, Checkpoint] = {}
    for name in names:
        shards[name] = read_file(index.parent / name)
        _check_count(sum(len(shard) for shard in shards.values()), str(index))
    lost = sorted(tensor for tensor, shard in places.items() if tensor not in shards[shard])
    if lost:
        raise ValueError(
            f"{index} places tensors in shards that do not hold them: "
            + some_of([f"{tensor} in {places[tensor]}" for tensor in lost])
        )
    beside = {name: x for shard in shards.values() for name, x in shard.items()}
    return beside | {tensor: shards[shard][tensor] for tensor, shard in places.items()}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = read_json(index, LARGEST_HEADER).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{index} is no index of shards: {error}") from None
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise ValueError(
            f"{index} is no index of shards: its weight_map is {places!r:.80}; accepted: an object "
            "of tensors' names and files"
        )
    _check_count(len(places), str(index))
    return places


def _check_count(tensors: int, origin: str) -> None:
    if tensors > _MOST_TENSORS:
        raise ValueError(f"{origin} holds {tensors:,} tensors; accepted: up to {_MOST_TENSORS:,}")


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many there are besides."""
    shown = ", ".join(name if len(name) < 200 else f"{name[:200]}..." for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def read_safetensors(file: Path) -> Checkpoint:
    """The tensors of one file, whose header is checked against its length.

    Raises:
      ValueError: naming the file and the byte offset where it is wrong.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{file} is no whole safetensors file: at offset 0 a header of {length} bytes is "
                f"announced, the file has {size}"
            )
        if length > LARGEST_HEADER:
            raise ValueError(
                f"{file}: its header has {length:,} bytes; accepted: up to {LARGEST_HEADER:,}"
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError(f"it is {header!r:.80}; accepted: an object")
        header.pop("__metadata__", None)
        _check_count(len(header), str(file))
        tensors = {name: _tensor(file, 8 + length, name, x) for name, x in header.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: broken header at offset 8: {error}") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            raise ValueError(f"{file}: {name:.80} begins at offset {tensor.offset}, expected {end}")
        end += tensor.nbytes
        if end > size:
            raise ValueError(
                f"{file} is cut off: {name:.80} ends at offset {end}, the file at {size}"
            )
    if end != size:
        raise ValueError(f"{file}: its tensors end at offset {end}, the file at {size}")
    return tensors


def _tensor(file: Path, start: int, name: str, entry: Any) -> Tensor:
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or any(field not in entry for field in fields):
        raise ValueError(f"{name:.80} is {entry!r:.80}; accepted: {', '.join(fields)}")
    dtype, shape, offsets = (entry[field] for field in fields)
    if dtype in _SUBBYTE:
        raise ValueError(f"{name:.80} is {dtype}, which is quantised; accepted: {_ACCEPTED}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r:.80} is unknown; accepted: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES:
        raise ValueError(f"{shape!r:.80} is a shape; accepted: a list of up to {_MOST_AXES}")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"{offsets!r:.80} are offsets; accepted: a list of two")
    for number in (*offsets, *shape):
        if type(number) is not int or not 0 <= number <= _LARGEST_AXIS:
            raise ValueError(
                f"{number!r:.80} in a shape or an offset; accepted: a whole number from 0"
            )
    begin, end = offsets
    tensor = Tensor(file, start + begin, DTYPES[dtype], tuple(shape))
    if end - begin != tensor.nbytes:
        raise ValueError(f"{end - begin} bytes for shape {tensor.shape} of {dtype}")
    return tensor


def check_weights(names: Iterable[str], checkpoint: Checkpoint, origin: str) -> None:
    """Raises ValueError for weights that are quantised or no floating point, naming some."""
    dtypes = {name: checkpoint[name].dtype for name in names if name in checkpoint}
    wrong = [f"{name} is {dtype.name}" for name, dtype in dtypes.items() if dtype not in WEIGHTS]
    if wrong:
        raise ValueError(f"{origin}: {some_of(wrong)}; accepted: {_ACCEPTED}")
