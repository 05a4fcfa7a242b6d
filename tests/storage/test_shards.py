import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moddistill.storage.safetensors import write
from moddistill.storage.shards import create_shards, open_checkpoint, parse_size
from moddistill.storage.tensor import TensorSpec

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.int64),
    "empty": np.zeros((0, 3), np.float16),
}


def write_index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("path", ["../model.safetensors", "/etc/passwd", "x/../../y", "..\\y"])
def test_index_that_names_files_outside_of_its_folder_is_refused(tmp_path, path):
    write_index(tmp_path, {"a": path})
    with pytest.raises(ValueError, match="expected shards in its folder, got"):
        open_checkpoint(tmp_path)


def test_index_and_shards_that_disagree_are_refused(tmp_path):
    save_file(ARRAYS, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "c": "one.safetensors"})
    with pytest.raises(ValueError, match=r"got shards without them: c in one\.safetensors"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(ValueError, match=r"expected 2 shards, got 1; missing: two\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_malformed_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ValueError,
        match=r"index\.json: (weight_map: )?expected (JSON|a JSON object|an object of te)",
    ):
        open_checkpoint(tmp_path)


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected model\.safetensors or .*, got no weights"):
        open_checkpoint(tmp_path)


def test_shards_are_written_in_any_order_and_read_by_others(tmp_path):
    arrays = {"a": np.ones((3, 4), np.float32), "b": np.arange(6, dtype=np.int64)}
    arrays["c"] = np.full((2, 2), 3, np.float16)
    planned = [TensorSpec(name, x.dtype, x.shape) for name, x in arrays.items()]
    places = create_shards(tmp_path, planned, largest=100)
    for name in reversed(arrays):
        write(places[name], arrays[name])
    # 48 and 48 bytes fit together, 8 more do not.
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    read = {name: x for file in files for name, x in load_file(tmp_path / file).items()}
    for name, expected in arrays.items():
        np.testing.assert_array_equal(read[name], expected)
    assert open_checkpoint(tmp_path).keys() == arrays.keys()


def test_array_of_another_shape_is_not_written(tmp_path):
    places = create_shards(tmp_path, [TensorSpec("a", np.dtype(np.float32), (2, 3))], 10**6)
    with pytest.raises(ValueError, match=r"expected shape \(2, 3\), got \(3, 2\)"):
        write(places["a"], np.zeros((3, 2), np.float32))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5e9), ("1.5 MB", 1.5e6), ("2gib", 2**31), ("100B", 100)]
)
def test_sizes_with_units_are_parsed(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0GB", "5TB", "9" * 20 + "GB"])
def test_malformed_size_is_refused(text):
    with pytest.raises(ValueError, match=f"max_shard_size: expected .* 5GB, got {text!r}"):
        parse_size(text)


def test_size_beyond_a_float_is_refused():
    with pytest.raises(ValueError, match="max_shard_size: expected a number and a unit"):
        parse_size("9" * 400 + "GB")
