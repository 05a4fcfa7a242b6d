"""Corrupt files: one error that names the file, the value and the expectation."""

import json
import shutil

import pytest
from safetensors.numpy import load_file

from moddistill.convert.describe import describe
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.sources import open_source
from moddistill.storage.safetensors import read_safetensors
from moddistill.storage.shards import open_checkpoint
from tests.convert import hf_folders as hf

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def made(tmp_path_factory, small_tokenizer):
    """A language model, a tower, and a model folder of the first."""
    root = tmp_path_factory.mktemp("made")
    hf.save(hf.Text(num_layers=1).model(), root / "hf", small_tokenizer)
    hf.save(hf.clip_tower(), root / "vision")
    import_model(str(root / "hf"), root / "model")
    return root


@pytest.fixture
def copied(made, tmp_path):
    """Returns a function that copies one of these folders."""

    def copy(name):
        return shutil.copytree(made / name, tmp_path / name)

    return copy


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json: expected a file of the tokenizers lib"),
        ("tokenizer.json", "{", r"tokenizer\.json: expected a file of the tokenizers lib"),
        ("config.json", DEEP, r"config\.json: expected JSON, .*recursion"),
        ("model.safetensors", "x" * 3, r"model\.safetensors: expected a complete safetensors file"),
    ],
    ids=["tokenizer", "half a tokenizer", "config", "weights"],
)
def test_corrupt_file_is_an_error_that_names_it(copied, tmp_path, file, content, message):
    folder = copied("hf")
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        import_model(str(folder), tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size: expected an integer > 0 .*, got '32'"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected an integer > 0 .*, got 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps: expected a number > 0 .*, got None"),
        (
            {"rope_parameters": {"rope_type": "default"}},
            "rope_theta: expected a number .*, got None",
        ),
        ({"rope_parameters": "default"}, "rope_parameters: expected an object, got 'default'"),
    ],
)
def test_config_field_of_another_type_is_an_error(copied, tmp_path, fields, message):
    """All other fields are stated, so that the defaults of `transformers` are not used."""
    folder = copied("hf")
    config = json.loads((folder / "config.json").read_text()) | {"rope_theta": None} | fields
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        import_model(str(folder), tmp_path / "out")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_config_part_that_is_no_object_is_an_error(copied, tmp_path, part):
    folder = copied("hf")
    parts = {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {"model_type": "clip_vision_model"},
    }
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llava"} | parts | {part: "published"})
    )
    with pytest.raises(ValueError, match=f"{part}: expected an object, got 'published'"):
        import_model(str(folder), tmp_path / "out")


def test_vision_config_field_of_another_type_is_an_error(made, copied, tmp_path):
    vision = copied("vision")
    config = json.loads((vision / "config.json").read_text()) | {"hidden_size": "24"}
    (vision / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="hidden_size"):
        import_model(str(made / "hf"), tmp_path / "out", vision=str(vision))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (DEEP, "header at offset 8: .*recursion"),
        ({"shape": [-1, -3], "data_offsets": [0, 12]}, "a: shape or offset: expected .*, got -1"),
        ({"shape": ["3"], "data_offsets": [0, 12]}, "a: shape or offset: expected .*, got '3'"),
        ({"shape": [1.5, 2], "data_offsets": [0, 12]}, "a: shape or offset: expected .*, got 1.5"),
        ({"shape": [3], "data_offsets": [0.0, 12]}, "a: shape or offset: expected .*, got 0.0"),
    ],
    ids=["deep", "negative", "text", "fraction", "offset"],
)
def test_invalid_safetensors_header_is_an_error(tmp_path, header, message):
    if isinstance(header, dict):
        header = json.dumps({"a": {"dtype": "F32"} | header})
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 12)
    with pytest.raises(ValueError, match=message):
        read_safetensors(file)


def test_deeply_nested_index_is_an_error(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(DEEP)
    with pytest.raises(ValueError, match=r"index\.json: expected JSON, got .*recursion"):
        open_checkpoint(tmp_path)


def test_all_missing_shards_are_listed(tmp_path):
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"expected 2 shards, got 0; missing: one\.safetensors, two\.safetensors"
    ):
        open_checkpoint(tmp_path)


def test_single_file_takes_precedence_over_a_stale_index(copied):
    folder = copied("hf")
    index = {"weight_map": {"a": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).keys() == load_file(folder / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"expected a JSON object, got \[\]"),
        (DEEP, "expected JSON, got .*recursion"),
        ('{"version": 3}', "architecture: expected an object, got None"),
        ('{"version": 3, "architecture": {}, "source": 3}', "source: expected an object, got 3"),
    ],
    ids=["list", "deep", "empty", "source"],
)
def test_invalid_model_json_is_an_error(copied, tmp_path, content, message):
    folder = copied("model")
    (folder / "model.json").write_text(content)
    for use in (
        lambda x: describe(str(x)),
        lambda x: export_model(x, tmp_path / "out", max_shard_size=10**9),
    ):
        with pytest.raises(ValueError, match=message):
            use(folder)


def test_model_folder_without_parameters_is_an_error(copied, tmp_path):
    folder = copied("model")
    shutil.rmtree(folder / "params")
    for use in (
        lambda x: describe(str(x)),
        lambda x: export_model(x, tmp_path / "out", max_shard_size=10**9),
    ):
        with pytest.raises(ValueError, match="complete model folder, got one without params"):
            use(folder)


def test_damaged_export_is_not_imported(sparse, tmp_path):
    _, out, _ = sparse("CLIP and Qwen2")
    folder = shutil.copytree(out, tmp_path / "export")
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"an undamaged .* does not match digests\.json"):
        open_source(folder)
    (folder / "digests.json").unlink()
    open_source(folder)
