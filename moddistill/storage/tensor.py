"""Tensors of weight files: location of the bytes, dtype, shape; and tensors to be written."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from moddistill.errors import UserError, invalid

# Names of the safetensors format, those of quantized weights included: errors name them.
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
ACCEPTED_WEIGHTS = "float32, bfloat16 or float16, such as the bfloat16 release"
WEIGHTS = tuple(DTYPES[name] for name in ("F32", "BF16", "F16"))
_MOST_TENSORS = 100_000  # of a checkpoint

Checkpoint = Mapping[str, "Tensor"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array in a file: little-endian, row-major, from byte `offset` on."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Maps the array read-only: pages are read when used, and freed with the array."""
        return self.map("r")

    def map(self, mode: Literal["r", "r+"]) -> np.ndarray:
        """Maps the array; with `r+`, assignments to it change the file."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        if self.offset + self.nbytes > (size := self.file.stat().st_size):
            raise UserError(
                f"{self.file} is truncated: expected {self.nbytes} bytes at offset {self.offset}, "
                f"got a file of {size}"
            )
        # Mapped as bytes, since an offset need not be a multiple of the dtype's size.
        data = np.memmap(self.file, np.uint8, mode, self.offset, (self.nbytes,))
        return np.asarray(data).view(self.dtype).reshape(self.shape)

    def rows(self, part: slice) -> "Tensor":
        """Returns a range of the first axis."""
        start, stop, _ = part.indices(self.shape[0])
        row_bytes = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return dataclasses.replace(self, offset=self.offset + start * row_bytes, shape=shape)


def check_count(tensors: int, origin: str) -> None:
    """Raises UserError for more tensors than any checkpoint has."""
    if tensors > _MOST_TENSORS:
        raise UserError(f"{origin}: expected at most {_MOST_TENSORS:,} tensors, got {tensors:,}")


def check_names(names: Collection[str], origin: str) -> None:
    """Raises UserError for too many tensors, or a name that is not one printable line.

    Names are in errors, of which they could otherwise forge lines.
    """
    check_count(len(names), origin)
    for name in names:
        if not name.isprintable():
            raise invalid(f"{origin}: name of a tensor", name, "printable characters")


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Returns the first names and the number of the others, for a message."""
    shown = ", ".join(name if len(name) < 200 else f"{name[:200]}..." for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def check_weights(names: Iterable[str], checkpoint: Checkpoint, origin: str) -> None:
    """Raises UserError naming weights that are quantized or not floating point."""
    dtypes = {name: checkpoint[name].dtype for name in names if name in checkpoint}
    wrong = [f"{name} in {dtype.name}" for name, dtype in dtypes.items() if dtype not in WEIGHTS]
    if wrong:
        raise UserError(f"{origin}: expected {ACCEPTED_WEIGHTS}, got {some_of(wrong)}")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize
