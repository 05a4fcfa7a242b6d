import json
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moddistill.storage.pickled import read_pickled
from moddistill.storage.safetensors import read_safetensors, write
from moddistill.storage.shards import create_shards, open_checkpoint, parse_size
from moddistill.storage.tensor import TensorSpec
from tests import torch_or_skip as torch

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.int64),
    "empty": np.zeros((0, 3), np.float16),
}


def test_safetensors_are_read(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    read = open_checkpoint(tmp_path)
    assert read.keys() == ARRAYS.keys()
    for name, expected in ARRAYS.items():
        np.testing.assert_array_equal(read[name].read(), expected)


def test_bfloat16_is_read(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(ml_dtypes.bfloat16)
    save_file({"x": x}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(open_checkpoint(tmp_path)["x"].read(), x)


@pytest.fixture
def whole(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(ARRAYS, file)
    return file


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:4], r"got a header .* at offset 0 in a file of 4"),
        (
            lambda data: b"\xff" * 8 + data[8:],
            r"got a header of 18446744073709551615 bytes at offset 0",
        ),
        (lambda data: data[:8] + b"[" + data[9:], r"header at offset 8: "),
        (
            lambda data: data.replace(b'"F32"', b'"F31"'),
            r"header at offset 8: a\.dtype: expected one of .*, got 'F31'",
        ),
        (
            lambda data: data.replace(b"[3,4]", b"[3,5]"),
            r"offset 8: a: expected 60 bytes for shape .*, got 48",
        ),
        (lambda data: data[:-3], r"is truncated: expected \d+ bytes for \w+, got \d+"),
        (lambda data: data + b"more", r"expected the end of the file at offset \d+, got \d+"),
    ],
    ids=["stub", "length", "json", "dtype", "shape", "truncated", "longer"],
)
def test_damaged_file_is_named_with_its_offset(whole, damage, message):
    data = whole.read_bytes()
    assert damage(data) != data
    whole.write_bytes(damage(data))
    with pytest.raises(ValueError, match=message) as error:
        read_safetensors(whole)
    assert str(whole) in str(error.value)


def write_index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("path", ["../model.safetensors", "/etc/passwd", "x/../../y", "..\\y"])
def test_index_that_leads_outside_is_refused(tmp_path, path):
    write_index(tmp_path, {"a": path})
    with pytest.raises(ValueError, match="expected shards in its folder, got"):
        open_checkpoint(tmp_path)


def test_index_and_shards_that_disagree(tmp_path):
    save_file(ARRAYS, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "c": "one.safetensors"})
    with pytest.raises(ValueError, match=r"got shards without them: c in one\.safetensors"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(ValueError, match=r"expected 2 shards, got 1; missing: two\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ValueError,
        match=r"index\.json: (weight_map: )?expected (JSON|a JSON object|an object of te)",
    ):
        open_checkpoint(tmp_path)


def test_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match=r"expected model\.safetensors or .*, got no weights"):
        open_checkpoint(tmp_path)


def random_state():
    return {
        "whole": torch.randn(4, 6),
        "half": torch.randn(3).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "numbers": torch.arange(7),
        "scalar": torch.tensor(2.5),
    }


def test_pickled_tensors_are_read(tmp_path):
    base = torch.randn(10)
    state = random_state() | {
        "views": base[2:8].reshape(2, 3),
        "parameter": torch.nn.Parameter(base),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    read = open_checkpoint(tmp_path)
    assert read.keys() == state.keys()
    for name, x in state.items():
        expected = x.detach().float().numpy()
        np.testing.assert_array_equal(read[name].read().astype(np.float32), expected)


def test_state_dictionary_of_a_module_is_read(tmp_path):
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "x.bin")
    assert read_pickled(tmp_path / "x.bin").keys() == {"weight", "bias"}


class Harmful:
    def __reduce__(self):
        return (print, ("ran",))


def test_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    torch.save(random_state() | {"x": Harmful()}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"would run (builtins|__builtin__)\.print"):
        read_pickled(tmp_path / "x.bin")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["torch.hub\nload", "os\nsystem", "torch\nload"])
def test_no_other_name_is_looked_up(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("x/data.pkl", f"c{name}\n.".encode())
    with pytest.raises(ValueError, match="got a pickle that would run"):
        read_pickled(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "content",
    [b"", b"not a zip", pickle.dumps({"a": 1})],
    ids=["empty", "text", "bare pickle"],
)
def test_file_that_is_no_archive(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"an archive of tensors .*, got something else"):
        read_pickled(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "around",
    [lambda x: [x], lambda x: {"a": {"b": x}}, lambda x: {"a": 3}],
    ids=["list", "nested", "number"],
)
def test_archive_of_something_else(tmp_path, around):
    torch.save(around(torch.zeros(2)), tmp_path / "x.bin")
    with pytest.raises(
        ValueError, match=r"flat dictionary of tensors, got (nested or )?other values"
    ):
        read_pickled(tmp_path / "x.bin")


def test_transposed_matrix(tmp_path):
    """As in published CLIP files, whose projections were written as `.T`."""
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": whole.T, "b": whole[1:].T}, tmp_path / "x.bin")
    tensors = read_pickled(tmp_path / "x.bin")
    np.testing.assert_array_equal(tensors["a"].read(), whole.T)
    np.testing.assert_array_equal(tensors["a"].rows(slice(1, 3)).read(), whole.T[1:3])
    np.testing.assert_array_equal(tensors["b"].read(), whole[1:].T)


def test_tensor_of_other_strides_is_refused(tmp_path):
    torch.save({"a": torch.zeros(4, 6)[:, ::2]}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"stride \(6, 2\) for shape \(4, 3\)"):
        read_pickled(tmp_path / "x.bin")


def test_tensor_beyond_its_storage_is_refused(tmp_path):
    """A pickle that states a larger shape than there are bytes."""
    torch.save({"a": torch.zeros(7, 9)}, tmp_path / "good.bin")
    archives = (zipfile.ZipFile(tmp_path / "good.bin"), zipfile.ZipFile(tmp_path / "bad.bin", "w"))
    with archives[0] as good, archives[1] as bad:
        for entry in good.infolist():
            content = good.read(entry)
            bad.writestr(entry, content[:-8] if entry.filename.endswith("/data/0") else content)
    with pytest.raises(
        ValueError, match=r"a: expected .* of 61 elements, got shape \(7, 9\) from element 0"
    ):
        read_pickled(tmp_path / "bad.bin")


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
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0GB", "5TB"])
def test_size_that_is_none(text):
    with pytest.raises(ValueError, match=f"max_shard_size: expected .* 5GB, got {text!r}"):
        parse_size(text)
