"""The parameters of a model folder on disk, read and written slice by slice.

`params/` is an Orbax checkpoint. Orbax writes whole arrays, and a stack of layers is as large as
all their shards together; so it writes the frame, and slices go straight into its array files.
"""

import collections
import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from moddistill.distributed.sharding import unbox
from moddistill.errors import UserError
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import check_same, flatten, unflatten
from moddistill.storage.digests import verify

_ITEM = "state"  # where Orbax keeps the arrays of a checkpoint that is one tree
_IN_FLIGHT = 128 * 2**20  # bytes
_BLOCK = 32 * 2**20  # bytes
_CACHE = 128 * 2**20  # bytes of chunks that two blocks share


def blocks(shape: tuple[int, ...], itemsize: int) -> tuple[int, list[slice]]:
    """The longer axis of a matrix, cut so that each block has at most 32 MiB."""
    axis = int(np.argmax(shape))
    step = max(1, _BLOCK * shape[axis] // (math.prod(shape) * itemsize))
    return axis, [slice(i, min(i + step, shape[axis])) for i in range(0, shape[axis], step)]


class ArraySpec(NamedTuple):
    """An array on disk; its first `sliced` axes are written and read index by index."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sliced: int

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of what is written at once."""
        if self.sliced or len(self.shape) != 2:
            return (1,) * self.sliced + self.shape[self.sliced :]
        axis, cuts = blocks(self.shape, self.dtype.itemsize)
        return tuple(cuts[0].stop if i == axis else n for i, n in enumerate(self.shape))


class Writer:
    """Writes slices in the background; a context manager that waits for them on leaving."""

    def __init__(self, folder: Path, specs: Mapping[str, ArraySpec]):
        frame = {path: jnp.zeros((1,) * len(s.shape), s.dtype) for path, s in specs.items()}
        ocp.save(folder.resolve(), unflatten(frame))
        self.arrays = {path: _create(folder, path, spec) for path, spec in specs.items()}
        self.pending: collections.deque[tuple[Any, int]] = collections.deque()
        self.in_flight = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        self._wait(0)

    def write(self, path: str, index: tuple[int | slice, ...], array: np.ndarray) -> None:
        """Puts `array` at `index` of an array."""
        self._wait(_IN_FLIGHT - array.nbytes)
        self.pending.append((self.arrays[path][index].write(array), array.nbytes))
        self.in_flight += array.nbytes

    def _wait(self, allowed: int) -> None:
        while self.pending and self.in_flight > allowed:
            future, size = self.pending.popleft()
            future.result()
            self.in_flight -= size


class Reader:
    """Arrays of `params/`, best read array by array.

    All files of the model folder are compared with their digests first. Most arrays are in chunks,
    of which those are read that an index touches. One that is not is read once and kept until
    another array is asked for.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(
                f"{str(folder.parent)!r} has no params folder; accepted: a whole model folder"
            )
        verify(folder.parent)
        self.folder = folder
        self.opened: tuple[str, Any] = ("", None)

    def read(self, path: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """What stands at `index` of an array."""
        with self._worded(path):
            array = self._array(path)
            return array[index] if isinstance(array, np.ndarray) else array[index].read().result()

    def dtype(self, path: str) -> np.dtype:
        with self._worded(path):
            return _open(self.folder, path).dtype.numpy_dtype

    def check(self, config: ModelConfig) -> None:
        """Raises UserError for parameters that are missing, or of another shape than `config`'s.

        All are listed.
        """
        expected = flatten(unbox(abstract_params(config)))
        found = {}
        for path in expected:
            with self._worded(path):
                found[path] = _open(self.folder, path)
        check_same(found, expected, str(self.folder))

    @contextlib.contextmanager
    def _worded(self, path: str) -> Iterator[None]:
        """Files that are missing or damaged end in errors of many kinds."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{self.folder}: {path} cannot be read: {reason:.300}; accepted: params/ as a "
                "stage or an import writes it"
            ) from error

    def _array(self, path: str) -> Any:
        if self.opened[0] != path:
            self.opened = ("", None)  # frees a stack before the next one is read
            array = _open(self.folder, path)
            chunk = array.chunk_layout.read_chunk.shape or array.shape
            in_slices = chunk[:1] == (1,) or math.prod(chunk) < math.prod(array.shape)
            self.opened = (path, array if in_slices else array.read().result())
        return self.opened[1]


def _kvstore(folder: Path, path: str) -> dict[str, Any]:
    name = path.replace("/", ".")
    return {"driver": "ocdbt", "base": f"file://{folder.resolve()}/{_ITEM}", "path": f"{name}/"}


def _create(folder: Path, path: str, spec: ArraySpec) -> Any:
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": _kvstore(folder, path),
            "metadata": {
                "shape": list(spec.shape),
                "data_type": spec.dtype.name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": list(spec.chunk)},
                },
                # Trained weights hardly shrink, and compressing is slower than a disk.
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            },
            "store_data_equal_to_fill_value": True,
            "create": True,
            "delete_existing": True,
        }
    ).result()


def _open(folder: Path, path: str) -> Any:
    spec = {"driver": "zarr3", "kvstore": _kvstore(folder, path)}
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    return ts.open(spec, open=True, read=True, context=context).result()
