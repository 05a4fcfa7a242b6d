import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from moddistill.errors import UserError
from moddistill.storage.safetensors import read_safetensors
from moddistill.storage.shards import open_checkpoint

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
def safetensors_file(tmp_path):
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
def test_damaged_file_is_named_with_its_offset(safetensors_file, damage, message):
    data = safetensors_file.read_bytes()
    assert damage(data) != data
    safetensors_file.write_bytes(damage(data))
    with pytest.raises(ValueError, match=message) as error:
        read_safetensors(safetensors_file)
    assert str(safetensors_file) in str(error.value)


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nerror: forged", "\x9b2J"])
def test_name_of_a_tensor_that_is_not_printable_is_refused_and_escaped(tmp_path, name):
    save_file({name: ARRAYS["a"]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"name of a tensor: expected printable char") as error:
        open_checkpoint(tmp_path)
    assert str(error.value).isprintable()
