"""The arrays of a model folder on disk: `params/`, an Orbax checkpoint.

Orbax writes and reads entire trees of sharded arrays. The converter moves slices, since a stack of
layers is as large as all weight files of a checkpoint together. Both use the same layout, which no
other file knows:

    state/_METADATA                 the tree as JSON; only Orbax reads and writes it
    state/manifest.ocdbt, state/d/  an OCDBT key-value store, with these keys for each array:
        decoder.norm.scale/zarr.json    zarr v3 metadata
        decoder.norm.scale/c/0          its chunks, numbered along each axis
"""

import collections
import contextlib
import importlib.metadata
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from moddistill.distributed.sharding import unbox
from moddistill.errors import UserError
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import Flat, check_same, flatten, unflatten
from moddistill.storage.digests import verify

_KNOWN_VERSION = "0.12.8"  # of orbax-checkpoint, whose layout this file describes
_ITEM = "state"  # the folder in which Orbax stores a checkpoint that is one tree
_LARGEST_BLOCK = 32 * 2**20  # bytes
_IN_FLIGHT = 128 * 2**20  # bytes of slices being written
_CACHE = 128 * 2**20  # bytes of chunks that several slices share


def stacked_axes(path: str) -> int:
    """Returns how many leading axes of an array count layers, and experts within a layer."""
    if not re.search(r"/(segment_\d+|layers|unused)/", path):
        return 0
    return 2 if "/experts_" in path else 1


def block_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of the even blocks, of at most 32 MiB, of a large array without layers.

    The longest axis is divided until a block is small enough. This is how Orbax chooses chunks,
    which have to divide the shard of each device; uneven ones would serve only one of the writers.
    An array whose axes have no such divisors (a vocabulary of prime size) is one block.
    """
    block = list(shape)
    while math.prod(block) * itemsize > _LARGEST_BLOCK:
        axis = int(np.argmax(block))
        block[axis] = next(n for n in range(block[axis] - 1, 0, -1) if shape[axis] % n == 0)
    # Blocks below 1 MiB would be thousands, each with its own entry in the key-value store.
    too_small = math.prod(block) * itemsize < _LARGEST_BLOCK // 32
    return shape if too_small else tuple(block)


def chunk_shape(path: str, shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of an array's chunks: one layer or expert, otherwise one block."""
    stacked = stacked_axes(path)
    if stacked:
        return (1,) * stacked + shape[stacked:]
    return block_shape(shape, itemsize)


def blocks(shape: tuple[int, ...], itemsize: int) -> tuple[int, list[slice]]:
    """Returns the longest axis of an array and its slices, which consist of complete blocks."""
    axis = int(np.argmax(shape))
    step = block_shape(shape, itemsize)[axis]
    return axis, [slice(i, i + step) for i in range(0, shape[axis], step)]


def write_arrays(folder: Path, params: dict[str, Any]) -> None:
    """Writes a tree of arrays; all processes call this, and each writes its shards."""
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = _storage_options
    # Trained weights hardly shrink, and compressing is slower than a disk.
    context.array.saving.use_compression = False
    with context:
        ocp.save(folder.resolve(), params)


def _storage_options(path: tuple[Any, ...], array: jax.Array) -> Any:
    """Returns what makes Orbax choose `chunk_shape` for the shards of an array."""
    options = ocp.options.ArrayOptions.Saving.StorageOptions
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    shard = array.sharding.shard_shape(array.shape)
    if stacked := stacked_axes(name):
        return options(shard_axes=tuple(range(stacked)))
    if block_shape(shard, array.itemsize) != shard:
        return options(chunk_byte_size=_LARGEST_BLOCK)
    return None


def abstract_arrays(folder: Path) -> Flat:
    """Returns `{path: leaf}` with the shape and dtype of each stored array."""
    # Not by Orbax, whose background tasks outlive the error when a file is damaged.
    with _readable(str(folder)):
        store = ts.KvStore.open({"driver": "ocdbt", "base": _base(folder)}).result()
        keys = sorted(key.decode() for key in store.list().result())
        names = [key.removesuffix("/zarr.json") for key in keys if key.endswith("/zarr.json")]
        stored = {path: _open(folder, path) for path in (name.replace(".", "/") for name in names)}
    return {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
        for path, array in stored.items()
    }


def read_arrays(folder: Path, abstract: dict[str, Any], partial: bool = False) -> dict[str, Any]:
    """Reads a tree of arrays straight into the dtypes and shardings of `abstract`.

    Args:
      partial: whether `abstract` lacks some of the stored arrays, which are not read.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    with _readable(str(folder)), context:
        return ocp.load(folder.resolve(), abstract)


class Writer:
    """Writes slices in the background; a context manager that waits for them on leaving.

    Orbax first writes a frame, the tree with one element for each array. Then each array is
    replaced by one of its full shape, and filled slice by slice.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, jax.ShapeDtypeStruct]):
        frame = {path: jnp.zeros((1,) * len(x.shape), x.dtype) for path, x in arrays.items()}
        write_arrays(folder, unflatten(frame))
        _check_layout(folder, frame)
        self.arrays = {path: _create(folder, path, x) for path, x in arrays.items()}
        self.pending: collections.deque[tuple[Any, int]] = collections.deque()
        self.in_flight = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        self._wait(0)

    def write(self, path: str, index: tuple[int | slice, ...], array: np.ndarray) -> None:
        """Writes `array` at `index` of the array at `path`; both must begin and end at chunks."""
        self._wait(_IN_FLIGHT - array.nbytes)
        self.pending.append((self.arrays[path][index].write(array), array.nbytes))
        self.in_flight += array.nbytes

    def _wait(self, allowed: int) -> None:
        while self.pending and self.in_flight > allowed:
            future, size = self.pending.popleft()
            future.result()
            self.in_flight -= size


class Reader:
    """Slices of the arrays in `params/`, best read array by array.

    All files of the model folder are compared with their digests first. An index reads the chunks
    that it touches. An array whose chunks are as long as itself is read once, and held until
    another array is read.
    """

    def __init__(self, folder: Path):
        check_exists(folder)
        verify(folder.parent)
        self.folder = folder
        self.stored = abstract_arrays(folder)
        self.opened: tuple[str, Any] = ("", None)

    def read(self, path: str, index: tuple[int | slice, ...] = ()) -> np.ndarray:
        """Reads the elements at `index` of an array."""
        with _readable(f"{self.folder}: {path}"):
            array = self._array(path)
            return array[index] if isinstance(array, np.ndarray) else array[index].read().result()

    def dtype(self, path: str) -> np.dtype:
        """Returns the stored dtype of an array."""
        return np.dtype(self.stored[path].dtype)

    def check(self, config: ModelConfig) -> None:
        """Raises UserError listing parameters that are missing, unexpected or misshapen."""
        check_same(self.stored, flatten(unbox(abstract_params(config))), str(self.folder))

    def _array(self, path: str) -> Any:
        if self.opened[0] != path:
            self.opened = ("", None)  # frees an array before the next one is read
            array = _open(self.folder, path)
            chunk = array.chunk_layout.read_chunk.shape or array.shape
            axis = 0 if stacked_axes(path) else int(np.argmax(array.shape or (1,)))
            is_chunked = chunk[axis : axis + 1] < array.shape[axis : axis + 1]
            self.opened = (path, array if is_chunked else array.read().result())
        return self.opened[1]


def check_exists(folder: Path) -> None:
    """Raises UserError unless a model folder has its `params/`."""
    if not folder.is_dir():
        raise UserError(
            f"{str(folder.parent)!r}: expected a complete model folder, got one without "
            f"{folder.name}/"
        )


@contextlib.contextmanager
def _readable(origin: str) -> Iterator[None]:
    """Turns the errors, of many kinds, of missing and damaged files into UserError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{origin}: expected arrays as a stage or an import writes them, got {reason:.300}"
        ) from error


def _check_layout(folder: Path, arrays: Flat) -> None:
    """Raises UserError if the installed Orbax has not written the layout that `_create` writes."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": _base(folder)}).result()
    for path, array in arrays.items():
        expected = _zarr_metadata(array, array.shape)
        found = json.loads(store.read(f"{_key(path)}zarr.json").result().value or "null")
        if {key: found and found.get(key) for key in expected} != expected:
            raise UserError(
                f"orbax-checkpoint {importlib.metadata.version('orbax-checkpoint')}: expected the "
                f"layout of {_KNOWN_VERSION}, {json.dumps(expected)}, got {json.dumps(found)}"
            )


def _base(folder: Path) -> str:
    return f"file://{folder.resolve()}/{_ITEM}/"


def _key(path: str) -> str:
    return path.replace("/", ".") + "/"


def _spec(folder: Path, path: str) -> dict[str, Any]:
    store = {"driver": "ocdbt", "base": _base(folder), "path": _key(path)}
    return {"driver": "zarr3", "kvstore": store}


def _zarr_metadata(array: Any, chunk: tuple[int, ...]) -> dict[str, Any]:
    """Returns the zarr v3 metadata that Orbax writes for an array in chunks of one shape."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    return {
        "shape": list(array.shape),
        "data_type": np.dtype(array.dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": list(chunk),
                    "codecs": [little_endian],
                    "index_codecs": [little_endian, {"name": "crc32c"}],
                },
            }
        ],
    }


def _create(folder: Path, path: str, array: jax.ShapeDtypeStruct) -> Any:
    chunk = chunk_shape(path, array.shape, array.dtype.itemsize)
    spec = _spec(folder, path) | {
        "metadata": _zarr_metadata(array, chunk),
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, create=True, delete_existing=True).result()


def _open(folder: Path, path: str) -> Any:
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    return ts.open(_spec(folder, path), open=True, read=True, context=context).result()
