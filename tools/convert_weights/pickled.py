"""PyTorch's `.bin` files, without PyTorch and without running anything that is in them.

Such a file is a zip archive: a pickle that describes tensors, and their bytes, uncompressed. The
pickle may name nothing but the few functions that describe a tensor (as `weights_only=True` does).
"""

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tools.convert_weights.tensors import DTYPES, Checkpoint, Tensor

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_LOCAL_HEADER = 30  # bytes before the name of an entry of a zip archive


class Refused(ValueError):
    """A file that can be read and is not accepted."""


class _Storage(NamedTuple):
    """The bytes that tensors are views of."""

    offset: int
    nbytes: int
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Transposed(Tensor):
    """Rows from `first` on of a matrix whose first axis, of `whole` rows, is the fastest."""

    first: int
    whole: int

    def map(self, mode: Literal["r", "r+"]) -> np.ndarray:
        stored = Tensor(self.file, self.offset, self.dtype, (self.shape[1], self.whole))
        return stored.map(mode).T[self.first : self.first + self.shape[0]]

    def rows(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(self.shape[0])
        shape = (stop - start, self.shape[1])
        return dataclasses.replace(self, shape=shape, first=self.first + start)


def read_pickled(file: Path) -> Checkpoint:
    """The tensors of a `.bin` file that holds one flat dictionary of them.

    Raises:
      ValueError: the file is no such archive, or its pickle names anything else than tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _read(file, archive)
    except Refused:
        raise
    # A broken pickle can fail in any way.
    except Exception as error:
        raise ValueError(
            f"{file} is no PyTorch archive of tensors ({error}); accepted: what torch.save writes "
            "since version 1.6, or safetensors"
        ) from None


def _read(file: Path, archive: zipfile.ZipFile) -> Checkpoint:
    [description] = [name for name in archive.namelist() if name.endswith("/data.pkl")] or [""]
    root = description.removesuffix("data.pkl")

    def storage(reference: tuple[Any, ...]) -> _Storage:
        _, dtype, key, *_ = reference
        entry = archive.getinfo(f"{root}data/{key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"{file}: {entry.filename} is compressed; accepted: stored as it is")
        return _Storage(_data_offset(file, entry), entry.file_size, dtype)

    def tensor(storage: _Storage, start: int, shape: Any, stride: Any, *_: Any) -> Tensor:
        first = start * storage.dtype.itemsize
        nbytes = math.prod(shape) * storage.dtype.itemsize
        if min((start, *shape)) < 0 or first + nbytes > storage.nbytes:
            raise Refused(
                f"{file} holds a tensor of shape {shape} from element {start} of "
                f"{storage.nbytes // storage.dtype.itemsize}; accepted: one inside of its storage"
            )
        place = (file, storage.offset + first, storage.dtype, tuple(shape))
        if _is_contiguous(shape, stride):
            return Tensor(*place)
        if len(shape) == 2 and _is_contiguous(shape[::-1], stride[::-1]):
            return _Transposed(*place, first=0, whole=shape[0])
        raise Refused(f"{file} holds a tensor of stride {stride} for shape {shape}")

    state = _TensorUnpickler(file, archive.read(description), storage, tensor).load()
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise Refused(f"{file} holds no flat dictionary of tensors")
    return state


class _TensorUnpickler(pickle.Unpickler):
    """Reads a pickle that describes tensors, and refuses every other name in it."""

    def __init__(self, file: Path, text: bytes, storage: Callable, tensor: Callable):
        super().__init__(io.BytesIO(text))
        self.file = file
        self.storage = storage
        self.known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        self.known |= {("torch", name): DTYPES[dtype] for name, dtype in _STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise Refused(
                f"{self.file} is refused: its pickle would run {module}.{name}; accepted: tensors "
                "alone"
            )
        return self.known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return self.storage(pid)


def _data_offset(file: Path, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, a name and an extra field."""
    with file.open("rb") as stream:
        stream.seek(entry.header_offset + 26)
        name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
    return entry.header_offset + _LOCAL_HEADER + name + extra


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
