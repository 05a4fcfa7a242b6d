"""Reads PyTorch's `.bin` files without PyTorch and without running code of a file.

Such a file is a zip archive: a pickle that describes tensors, and their bytes, uncompressed.
"""

import dataclasses
import math
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np

from moddistill.errors import UserError
from moddistill.storage.pickle_reader import STORAGES, UnsupportedError, View, read_pickle
from moddistill.storage.tensor import DTYPES, Checkpoint, Tensor, check_names

_LARGEST_PICKLE = 16 * 2**20  # bytes; a tensor takes about 200
_LOCAL_HEADER = 30  # bytes before the name of an entry of a zip archive


@dataclasses.dataclass(frozen=True)
class _Transposed(Tensor):
    """Rows from `first` on of a column-major matrix of `num_rows` rows."""

    first: int
    num_rows: int

    def map(self, mode: Literal["r", "r+"]) -> np.ndarray:
        # The file has the transpose [columns, num_rows] in row-major order; `.T` is a view of it.
        stored = Tensor(self.file, self.offset, self.dtype, (self.shape[1], self.num_rows))
        return stored.map(mode).T[self.first : self.first + self.shape[0]]

    def rows(self, part: slice) -> Tensor:
        start, stop, _ = part.indices(self.shape[0])
        shape = (stop - start, self.shape[1])
        return dataclasses.replace(self, shape=shape, first=self.first + start)


def read_pickled(file: Path) -> Checkpoint:
    """Reads a `.bin` file of one flat dictionary of tensors.

    Raises:
      UserError: if this is not such an archive, or its pickle describes anything but tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            checkpoint = _read(file, archive)
    except UnsupportedError:
        raise
    # A broken archive can fail in any way.
    except Exception as error:
        raise UserError(
            f"{file}: expected safetensors or an archive of tensors as torch.save writes it since "
            f"version 1.6, got something else ({error})"
        ) from None
    check_names(checkpoint, str(file))
    return checkpoint


def _read(file: Path, archive: zipfile.ZipFile) -> Checkpoint:
    [description] = [name for name in archive.namelist() if name.endswith("/data.pkl")] or [""]
    size = archive.getinfo(description).file_size
    if size > _LARGEST_PICKLE:
        raise UnsupportedError(
            f"{file}: {description}: expected at most {_LARGEST_PICKLE:,} bytes, got {size:,}"
        )
    state = read_pickle(archive.read(description), str(file))
    is_flat = isinstance(state, dict) and all(isinstance(x, View) for x in state.values())
    if not is_flat or not state:
        raise UnsupportedError(f"{file}: expected a flat dictionary of tensors, got other values")
    # Entries are `NAME/data.pkl` and, for each storage, `NAME/data/KEY`.
    root = description.removesuffix("data.pkl")
    return {name: _tensor(file, archive, root, name, view) for name, view in state.items()}


def _tensor(file: Path, archive: zipfile.ZipFile, root: str, name: str, view: View) -> Tensor:
    """Locates the elements of a view, after checking that they are within its storage."""
    storage, start, shape, stride = view
    entry = archive.getinfo(f"{root}data/{storage.key}")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise UnsupportedError(
            f"{file}: {entry.filename}: expected an uncompressed entry, got another"
        )
    dtype = DTYPES[STORAGES[storage.kind]]
    first = start * dtype.itemsize
    # The extent of a contiguous tensor; others are refused below.
    if first + math.prod(shape) * dtype.itemsize > entry.file_size:
        raise UnsupportedError(
            f"{file}: {name:.80}: expected a tensor within its storage of "
            f"{entry.file_size // dtype.itemsize} elements, got shape {shape} from element {start}"
        )
    # Entries are uncompressed, so a tensor is mapped from the archive itself.
    location = (file, _data_offset(file, entry) + first, dtype, shape)
    if _is_contiguous(shape, stride):
        return Tensor(*location)
    if len(shape) == 2 and _is_contiguous(shape[::-1], stride[::-1]):
        return _Transposed(*location, first=0, num_rows=shape[0])
    raise UnsupportedError(
        f"{file}: {name:.80}: expected a contiguous tensor or the transpose of one, got stride "
        f"{stride} for shape {shape}"
    )


def _data_offset(file: Path, entry: zipfile.ZipInfo) -> int:
    """Returns the offset of an entry's bytes: after its local header, name and extra field."""
    # The central directory lacks the length of the local extra field, by which torch aligns data.
    with file.open("rb") as stream:
        stream.seek(entry.header_offset + 26)
        name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
    return entry.header_offset + _LOCAL_HEADER + name + extra


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        # The stride of an axis of size 1 is never used, so any is accepted.
        if size != 1 and step != expected:
            return False
        expected *= size
    return True
