import pytest

from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.storage.model_folder import read_model_config
from tests.convert import hf_folders as hf


@pytest.fixture
def source(tmp_path, small_tokenizer):
    return hf.save(hf.Text(num_layers=1).model(), tmp_path / "hf", small_tokenizer)


def test_command_replaces_its_own_output(source, tmp_path):
    out = tmp_path / "out"
    import_model(str(source), out)
    import_model(str(source), out, template="vicuna", overwrite=True)
    assert read_model_config(out).template == "vicuna"
    for name in ("one", "two"):
        export_model(out, tmp_path / "export", max_shard_size=10**9, overwrite=name == "two")


def test_command_does_not_replace_the_output_of_another(source, tmp_path):
    out = tmp_path / "out"
    import_model(str(source), out)
    export_model(out, tmp_path / "export", max_shard_size=10**9)
    import_model(str(source), tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"/other': expected .* export wrote, got one that import wrote"
    ):
        export_model(out, tmp_path / "other", max_shard_size=10**9, overwrite=True)
    with pytest.raises(
        ValueError, match=r"/export': expected .* import wrote, got one that export wrote"
    ):
        import_model(str(source), tmp_path / "export", overwrite=True)


def test_folder_without_digests_is_not_replaced(source, tmp_path):
    """A folder with the file names of an export is not enough."""
    import_model(str(source), tmp_path / "out")
    other = hf.save(hf.Text(num_layers=1).model(), tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"/other: expected a new folder, or .*, got one without dig"
    ):
        export_model(tmp_path / "out", other, max_shard_size=10**9, overwrite=True)
    assert (other / "model.safetensors").is_file()
