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

from moddistill.errors import UserError
from moddistill.storage.tensor import (
    ACCEPTED_WEIGHTS,
    DTYPES,
    Checkpoint,
    Planned,
    Tensor,
    check_count,
)

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SUBBYTE = ("F4", "F6_E2M3", "F6_E3M2")  # whose numbers share bytes
# Bytes; the format allows six times as many, a file of 100,000 tensors has 12 MB.
LARGEST_HEADER = 16 * 2**20
_LARGEST_AXIS = 2**40
_MOST_AXES = 8


def read_safetensors(file: Path) -> Checkpoint:
    """The tensors of one file, whose header is checked against its length.

    Raises:
      UserError: naming the file and the byte offset where it is wrong.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{file} is no whole safetensors file: at offset 0 a header of {length} bytes is "
                f"announced, the file has {size}"
            )
        if length > LARGEST_HEADER:
            raise UserError(
                f"{file}: its header has {length:,} bytes; accepted: up to {LARGEST_HEADER:,}"
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise UserError(f"it is {header!r:.80}; accepted: an object")
        header.pop("__metadata__", None)
        check_count(len(header), str(file))
        tensors = {name: _tensor(file, 8 + length, name, x) for name, x in header.items()}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: broken header at offset 8: {error}") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            raise UserError(f"{file}: {name:.80} begins at offset {tensor.offset}, expected {end}")
        end += tensor.nbytes
        if end > size:
            raise UserError(
                f"{file} is cut off: {name:.80} ends at offset {end}, the file at {size}"
            )
    if end != size:
        raise UserError(f"{file}: its tensors end at offset {end}, the file at {size}")
    return tensors


def _tensor(file: Path, start: int, name: str, entry: Any) -> Tensor:
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or any(field not in entry for field in fields):
        raise UserError(f"{name:.80} is {entry!r:.80}; accepted: {', '.join(fields)}")
    dtype, shape, offsets = (entry[field] for field in fields)
    if dtype in _SUBBYTE:
        raise UserError(f"{name:.80} is {dtype}, which is quantised; accepted: {ACCEPTED_WEIGHTS}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r:.80} is unknown; accepted: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES:
        raise UserError(f"{shape!r:.80} is a shape; accepted: a list of up to {_MOST_AXES}")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise UserError(f"{offsets!r:.80} are offsets; accepted: a list of two")
    for number in (*offsets, *shape):
        if type(number) is not int or not 0 <= number <= _LARGEST_AXIS:
            raise UserError(
                f"{number!r:.80} in a shape or an offset; accepted: a whole number from 0"
            )
    begin, end = offsets
    tensor = Tensor(file, start + begin, DTYPES[dtype], tuple(shape))
    if end - begin != tensor.nbytes:
        raise UserError(f"{end - begin} bytes for shape {tensor.shape} of {dtype}")
    return tensor


def write(place: Tensor, array: np.ndarray, origin: str = "") -> None:
    """Puts an array of the planned shape into its place, in the planned dtype.

    Args:
      origin: folder and name of the tensor, for errors; by default the file that is written.

    Raises:
      UserError: if the array has another shape, or a number that is too large for the dtype.
    """
    origin = origin or str(place.file)
    if array.shape != place.shape:
        raise UserError(f"{origin}: {array.shape} was given for {place.shape}")
    with np.errstate(over="ignore"):
        written = array.astype(place.dtype, copy=False)
    if array.dtype != place.dtype and np.any(np.isinf(written) & np.isfinite(array)):
        accepted = "bfloat16 or float32" if place.dtype == np.float16 else "float32"
        largest = float(np.abs(array[np.isfinite(array)]).max())
        raise UserError(
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
