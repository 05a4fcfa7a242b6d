"""PyTorch's `.bin` files, without PyTorch and without running anything that is in them.

Such a file is a zip archive: a pickle that describes tensors, and their bytes, uncompressed.
"""

import dataclasses
import math
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np

from moddistill.errors import UserError
from moddistill.storage.pickle_reader import STORAGES, Refused, View, load
from moddistill.storage.tensor import DTYPES, Checkpoint, Tensor

_LARGEST_PICKLE = 16 * 2**20  # bytes; a tensor takes about 200
_LOCAL_HEADER = 30  # bytes before the name of an entry of a zip archive


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
      UserError: the file is no such archive, or its pickle names anything else than tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _read(file, archive)
    except Refused:
        raise
    # A broken archive can fail in any way.
    except Exception as error:
        raise UserError(
            f"{file} is no PyTorch archive of tensors ({error}); accepted: what torch.save writes "
            "since version 1.6, or safetensors"
        ) from None


def _read(file: Path, archive: zipfile.ZipFile) -> Checkpoint:
    [description] = [name for name in archive.namelist() if name.endswith("/data.pkl")] or [""]
    size = archive.getinfo(description).file_size
    if size > _LARGEST_PICKLE:
        raise Refused(
            f"{file}: {description} has {size:,} bytes; accepted: up to {_LARGEST_PICKLE:,}"
        )
    state = load(archive.read(description), str(file))
    is_flat = isinstance(state, dict) and all(isinstance(x, View) for x in state.values())
    if not is_flat or not state:
        raise Refused(f"{file} holds no flat dictionary of tensors")
    root = description.removesuffix("data.pkl")
    return {name: _tensor(file, archive, root, name, view) for name, view in state.items()}


def _tensor(file: Path, archive: zipfile.ZipFile, root: str, name: str, view: View) -> Tensor:
    """Where the numbers of a view are, after checking that they are in its storage."""
    storage, start, shape, stride = view
    entry = archive.getinfo(f"{root}data/{storage.key}")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise Refused(f"{file}: {entry.filename} is compressed; accepted: stored as it is")
    dtype = DTYPES[STORAGES[storage.kind]]
    first = start * dtype.itemsize
    if first + math.prod(shape) * dtype.itemsize > entry.file_size:
        raise Refused(
            f"{file} holds a tensor of shape {shape} from element {start} of "
            f"{entry.file_size // dtype.itemsize}; accepted: one inside of its storage"
        )
    place = (file, _data_offset(file, entry) + first, dtype, shape)
    if _is_contiguous(shape, stride):
        return Tensor(*place)
    if len(shape) == 2 and _is_contiguous(shape[::-1], stride[::-1]):
        return _Transposed(*place, first=0, whole=shape[0])
    raise Refused(f"{file} holds a tensor of stride {stride} for shape {shape}")


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
