import pickle
import zipfile

import numpy as np
import pytest

from moddistill.storage.pickled import read_pickled
from moddistill.storage.shards import open_checkpoint
from tests import torch_or_skip as torch


def random_state():
    return {
        "float": torch.randn(4, 6),
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
def test_pickle_with_another_global_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("x/data.pkl", f"c{name}\n.".encode())
    with pytest.raises(ValueError, match="got a pickle that would run"):
        read_pickled(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "content",
    [b"", b"not a zip", pickle.dumps({"a": 1})],
    ids=["empty", "text", "bare pickle"],
)
def test_file_that_is_not_an_archive_is_refused(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"an archive of tensors .*, got something else"):
        read_pickled(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "around",
    [lambda x: [x], lambda x: {"a": {"b": x}}, lambda x: {"a": 3}],
    ids=["list", "nested", "number"],
)
def test_archive_of_other_values_is_refused(tmp_path, around):
    torch.save(around(torch.zeros(2)), tmp_path / "x.bin")
    with pytest.raises(
        ValueError, match=r"flat dictionary of tensors, got (nested or )?other values"
    ):
        read_pickled(tmp_path / "x.bin")


def test_transposed_matrix_is_read(tmp_path):
    """As in published CLIP files, whose projections were written as `.T`."""
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": base.T, "b": base[1:].T}, tmp_path / "x.bin")
    tensors = read_pickled(tmp_path / "x.bin")
    np.testing.assert_array_equal(tensors["a"].read(), base.T)
    np.testing.assert_array_equal(tensors["a"].rows(slice(1, 3)).read(), base.T[1:3])
    np.testing.assert_array_equal(tensors["b"].read(), base[1:].T)


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


def test_name_of_a_tensor_that_is_not_printable_is_refused_and_escaped(tmp_path):
    torch.save({"a\x1b[2J": torch.ones(2)}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="name of a tensor: expected printable char") as error:
        read_pickled(tmp_path / "x.bin")
    assert str(error.value).isprintable()
