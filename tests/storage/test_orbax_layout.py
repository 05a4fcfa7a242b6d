"""The bytes of `params/`: pinned, and the same from both writers."""

import importlib.metadata
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from moddistill.params import flatten, unflatten
from moddistill.storage import orbax_layout
from moddistill.storage.digests import write_digests
from moddistill.storage.orbax_layout import (
    Reader,
    Writer,
    abstract_arrays,
    block_shape,
    chunk_shape,
    read_arrays,
    write_arrays,
)

ARRAYS = {
    "decoder/embedding": np.arange(24, dtype=np.float32).reshape(6, 4),
    "decoder/segment_0/block_0/norm/scale": np.arange(6, dtype=np.float32).reshape(2, 3),
    "decoder/segment_0/block_0/moe/experts_up": np.arange(24, dtype=ml_dtypes.bfloat16).reshape(
        2, 2, 2, 3
    ),
}
CHUNKS = {
    "decoder/embedding": (6, 4),
    "decoder/segment_0/block_0/norm/scale": (1, 3),
    "decoder/segment_0/block_0/moe/experts_up": (1, 1, 2, 3),
}


def write_slices(folder, arrays):
    specs = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}
    with Writer(folder, specs) as writer:
        for path, array in arrays.items():
            for index in np.ndindex(array.shape[: orbax_layout.stacked_axes(path)]):
                writer.write(path, index, array[index])


def write_tree(folder, arrays):
    write_arrays(folder, jax.tree.map(jnp.asarray, unflatten(arrays)))


def read_slices(folder):
    write_digests(folder.parent, "train")
    reader = Reader(folder)
    return {path: reader.read(path) for path in ARRAYS}


def read_tree(folder):
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_device)
        for path, x in abstract_arrays(folder).items()
    }
    return flatten(read_arrays(folder, unflatten(abstract)))


def zarr_files(folder):
    """`{key: content}` of all keys in the key-value store; JSON files are parsed."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/state/"}).result()
    content = {key.decode(): store.read(key).result().value for key in store.list().result()}
    return {key: json.loads(x) if key.endswith(".json") else x for key, x in content.items()}


def pinned_metadata(path):
    """The zarr metadata of orbax-checkpoint 0.12.8."""
    array, chunk = ARRAYS[path], list(CHUNKS[path])
    little_endian = {"configuration": {"endian": "little"}, "name": "bytes"}
    shard = {
        "chunk_shape": chunk,
        "codecs": [little_endian],
        "index_codecs": [little_endian, {"name": "crc32c"}],
    }
    return {
        "chunk_grid": {"configuration": {"chunk_shape": chunk}, "name": "regular"},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"configuration": shard, "name": "sharding_indexed"}],
        "data_type": array.dtype.name,
        "fill_value": 0.0,
        "node_type": "array",
        "shape": list(array.shape),
        "zarr_format": 3,
    }


@pytest.mark.parametrize("read", [read_tree, read_slices])
@pytest.mark.parametrize("write", [write_tree, write_slices])
def test_each_reader_reads_what_each_writer_wrote(write, read, tmp_path):
    write(tmp_path / "params", ARRAYS)
    found = read(tmp_path / "params")
    assert found.keys() == ARRAYS.keys()
    for path, expected in ARRAYS.items():
        assert found[path].dtype == expected.dtype
        np.testing.assert_array_equal(found[path], expected)


@pytest.mark.parametrize("write", [write_tree, write_slices])
def test_layout_on_disk_is_pinned(write, tmp_path):
    write(tmp_path / "params", ARRAYS)
    files = (x for x in (tmp_path / "params").rglob("*") if x.is_file())
    names = {x.relative_to(tmp_path / "params").as_posix() for x in files}
    assert {re.sub("/[0-9a-f]{32}$", "/DATA", name) for name in names} == {
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
        "orbax.checkpoint",
        "state/_METADATA",
        "state/_sharding",
        "state/array_metadatas/process_0",
        "state/d/DATA",
        "state/manifest.ocdbt",
        "state/ocdbt.process_0/d/DATA",
        "state/ocdbt.process_0/manifest.ocdbt",
    }
    metadata = json.loads((tmp_path / "params" / "state" / "_METADATA").read_text())
    assert (metadata["use_ocdbt"], metadata["use_zarr3"]) == (True, True)
    assert metadata["tree_metadata"].keys() == {str(tuple(path.split("/"))) for path in ARRAYS}
    files = zarr_files(tmp_path / "params")
    assert {key: x for key, x in files.items() if key.endswith(".json")} == {
        f"{path.replace('/', '.')}/zarr.json": pinned_metadata(path) for path in ARRAYS
    }


def test_both_writers_write_the_same_chunks(tmp_path):
    write_tree(tmp_path / "tree", ARRAYS)
    write_slices(tmp_path / "slices", ARRAYS)
    files = zarr_files(tmp_path / "tree")
    assert files == zarr_files(tmp_path / "slices")
    name = "decoder.segment_0.block_0.norm.scale"
    assert sorted(key for key in files if key.startswith(f"{name}/c")) == [
        f"{name}/c/0/0",
        f"{name}/c/1/0",
    ]
    assert files[f"{name}/c/1/0"][:12] == np.array([3, 4, 5], "<f4").tobytes()


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (97, 64), (2, 3, 60), (1000, 4), (7,)])
def test_orbax_chooses_the_same_blocks(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_layout, "_LARGEST_BLOCK", 2048)
    write_tree(tmp_path / "params", {"head": np.zeros(shape, np.float32)})
    [metadata] = [x for key, x in zarr_files(tmp_path / "params").items() if "json" in key]
    assert tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]) == block_shape(shape, 4)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((151_936, 2048), (2374, 2048)),
        ((2048, 151_936), (2048, 2374)),
        ((152_064, 3584), (3456, 1792)),
        ((151_936, 16), (151_936, 16)),  # small
        ((151_937, 2048), (151_937, 2048)),  # prime
        ((151_655, 896), (4333, 896)),
    ],
)
def test_blocks_of_large_matrices_are_even_and_at_most_32_mib(shape, block):
    assert block_shape(shape, 4) == block
    assert chunk_shape("decoder/head", shape, 4) == block


def test_orbax_of_another_layout_is_refused(tmp_path, monkeypatch):
    """An Orbax that writes another codec, as a release might."""
    expected = orbax_layout._zarr_metadata

    def other(array, chunk):
        return expected(array, chunk) | {"codecs": []}

    monkeypatch.setattr(orbax_layout, "_zarr_metadata", other)
    version = importlib.metadata.version("orbax-checkpoint")
    message = rf"orbax-checkpoint {version}: expected the layout of 0\.12\.8, .*, got .*sharding_in"
    with pytest.raises(ValueError, match=message):
        write_slices(tmp_path / "params", ARRAYS)


def test_parameters_of_another_layout_are_refused_by_the_reader(tmp_path):
    """A checkpoint that Orbax reads, but without the key-value store."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    with context:
        ocp.save(tmp_path / "params", {"head": jnp.zeros((2, 3))})
    write_digests(tmp_path, "train")
    reader = Reader(tmp_path / "params")
    with pytest.raises(ValueError, match=r"/params: head: expected arrays as a stage .*, got "):
        reader.read("head")


def test_array_in_chunks_as_long_as_itself_is_read_once(tmp_path):
    write_tree(tmp_path / "params", ARRAYS)
    write_digests(tmp_path, "train")
    reader = Reader(tmp_path / "params")
    first = reader.read("decoder/embedding", (slice(0, 2),))
    second = reader.read("decoder/embedding", (slice(2, 4),))
    assert np.shares_memory(first.base, second.base)
    np.testing.assert_array_equal(second, ARRAYS["decoder/embedding"][2:4])
