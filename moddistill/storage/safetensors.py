"""Reads and writes one safetensors file.

Reading checks the header against the length of the file and maps tensors lazily. Writing creates
the file at its final size first, then fills tensors in any order, one at a time in memory.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moddistill.errors import UserError, invalid, not_one_of
from moddistill.storage.tensor import (
    ACCEPTED_WEIGHTS,
    DTYPES,
    Checkpoint,
    Tensor,
    TensorSpec,
    check_names,
)

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SUBBYTE = ("F4", "F6_E2M3", "F6_E3M2")  # elements of less than a byte
# Bytes; the format allows six times as many, a file of 100,000 tensors has 12 MB.
LARGEST_HEADER = 16 * 2**20
_LARGEST_AXIS = 2**40
_MOST_AXES = 8


def read_safetensors(file: Path) -> Checkpoint:
    """Reads the header of one file, and checks it against the length of the file.

    The data of the tensors must fill the file without gaps, as the format requires.

    Raises:
      UserError: naming the file and the byte offset of the fault.
    """
    text = _read_header(file)
    start = 8 + len(text)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise UserError(f"expected an object, got {header!r:.80}")
        header.pop("__metadata__", None)
        check_names(header, str(file))
        tensors = {name: _tensor(file, start, name, entry) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: header at offset 8: {error}") from None
    _check_gapless(file, tensors, start)
    return tensors


def _read_header(file: Path) -> bytes:
    """Reads the JSON text of the header, whose length is in the first 8 bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{file}: expected a complete safetensors file, got a header of {length} bytes at "
                f"offset 0 in a file of {size}"
            )
        if length > LARGEST_HEADER:
            raise UserError(
                f"{file}: expected a header of at most {LARGEST_HEADER:,} bytes, got {length:,}"
            )
        return stream.read(length)


def _check_gapless(file: Path, tensors: Checkpoint, start: int) -> None:
    """Checks that tensors follow one another from byte `start` to the end of the file."""
    size, end = file.stat().st_size, start
    # In the order of offsets, a gap and an overlap both begin elsewhere than the last tensor ended.
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            raise UserError(f"{file}: {name:.80}: expected offset {end}, got {tensor.offset}")
        end += tensor.nbytes
        if end > size:
            raise UserError(f"{file} is truncated: expected {end} bytes for {name:.80}, got {size}")
    if end != size:
        raise UserError(f"{file}: expected the end of the file at offset {end}, got {size}")


def _tensor(file: Path, start: int, name: str, entry: Any) -> Tensor:
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or any(field not in entry for field in fields):
        raise UserError(f"{name:.80}: expected {', '.join(fields)}, got {entry!r:.80}")
    dtype, shape, offsets = (entry[field] for field in fields)
    if dtype in _SUBBYTE:
        raise UserError(f"{name:.80}: expected {ACCEPTED_WEIGHTS}, got {dtype} (quantized)")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise not_one_of(f"{name:.80}.dtype", dtype, DTYPES)
    if not isinstance(shape, list) or len(shape) > _MOST_AXES:
        raise invalid(f"{name:.80}.shape", shape, f"a list of at most {_MOST_AXES} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise invalid(f"{name:.80}.data_offsets", offsets, "a list of two")
    for number in (*offsets, *shape):
        if type(number) is not int or not 0 <= number <= _LARGEST_AXIS:
            raise invalid(f"{name:.80}: shape or offset", number, "an integer from 0")
    begin, end = offsets
    tensor = Tensor(file, start + begin, DTYPES[dtype], tuple(shape))
    if end - begin != tensor.nbytes:
        raise UserError(
            f"{name:.80}: expected {tensor.nbytes} bytes for shape {tensor.shape} of {dtype}, "
            f"got {end - begin}"
        )
    return tensor


def write(tensor: Tensor, array: np.ndarray, origin: str = "") -> None:
    """Writes an array to its tensor of a file, in the dtype of the tensor.

    Args:
      origin: folder and name of the tensor, for errors; by default the file being written.

    Raises:
      UserError: if the array has another shape, or a number that overflows the dtype.
    """
    origin = origin or str(tensor.file)
    if array.shape != tensor.shape:
        raise UserError(f"{origin}: expected shape {tensor.shape}, got {array.shape}")
    with np.errstate(over="ignore"):
        written = array.astype(tensor.dtype, copy=False)
    if array.dtype != tensor.dtype and np.any(np.isinf(written) & np.isfinite(array)):
        wider = "bfloat16 or float32" if tensor.dtype == np.float16 else "float32"
        largest = float(np.abs(array[np.isfinite(array)]).max())
        raise UserError(
            f"{origin}: expected numbers within the range of {tensor.dtype}, got {largest:.4g}; "
            f"it fits {wider}"
        )
    tensor.map("r+")[...] = written


def create_file(file: Path, tensors: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Creates one file, whose tensors are zero until `write` fills them."""
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
    # Spaces align the data to 8 bytes, so that tensors can be mapped in place.
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if hasattr(os, "posix_fallocate"):
            # Reserves the blocks: writing to a page without one, on a full disk, kills the process.
            os.posix_fallocate(stream.fileno(), 0, start + position)
        else:  # macOS
            stream.truncate(start + position)
    return {
        tensor.name: Tensor(
            file, start + header[tensor.name]["data_offsets"][0], tensor.dtype, tensor.shape
        )
        for tensor in tensors
    }
