"""The record of an import in `model.json`, and settings that no tower can have."""

import json
import re

import pytest

from moddistill.storage.digests import write_digests
from moddistill.storage.model_folder import read_model_config, read_source, save_model


@pytest.fixture(scope="module")
def model(tiny_architecture, init, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("record") / "model"
    config = tiny_architecture()
    save_model(folder, config, init(config), tokenizer, {})
    return folder


@pytest.fixture
def change(model):
    """`change(edit)`: applies an edit to the parsed `model.json`, with digests that match it."""
    file = model / "model.json"
    before = file.read_text()

    def rewrite(edit):
        fields = json.loads(before)
        edit(fields)
        file.write_text(json.dumps(fields))
        write_digests(model, "train")
        return model

    yield rewrite
    file.write_text(before)
    write_digests(model, "train")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("from", "hf", "a list of names"),
        ("new", [1], "a list of names"),
        ("stored_head", 1, "true or false"),
        ("generation", 5, "an object"),
        ("generation", [1], "an object"),
        ("generation", "x", "an object"),
        ("generation", None, "an object"),
        ("replaced", 5, "a list of texts"),
        ("replaced", [1, 2], "a list of texts"),
        ("replaced", "abc", "a list of texts"),
    ],
)
def test_import_record_of_another_type_is_refused(field, value, expected, change):
    folder = change(lambda fields: fields["source"].update(imported={field: value}))
    with pytest.raises(ValueError) as error:
        read_source(folder)
    assert str(error.value) == (
        f"{folder / 'model.json'}: source.imported.{field}: expected {expected}, got {value!r}"
    )


def test_import_record_is_read(change):
    imported = {
        "from": ["hf"],
        "new": ["projector/linear_0/kernel"],
        "stored_head": False,
        "generation": {"temperature": 0.7},
        "replaced": ["do_pad None -> True"],
    }
    folder = change(lambda fields: fields["source"].update(imported=imported))
    assert read_source(folder) == {"imported": imported}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("select_layer", -9, r"vision\.select_layer: expected -.*, got -9$"),
        ("activation", "gel", r"vision\.activation: expected one of .*, got 'gel'"),
    ],
)
def test_vision_setting_out_of_range_is_named_with_its_file(field, value, message, change):
    folder = change(lambda fields: fields["architecture"]["vision"].update({field: value}))
    with pytest.raises(ValueError) as error:
        read_model_config(folder)
    origin = re.escape(f"{folder / 'model.json'}: ")
    assert re.match(origin + message, str(error.value))


def test_value_of_another_type_is_named_with_its_file_once(change):
    folder = change(lambda fields: fields["architecture"]["vision"].update(select_layer="x"))
    with pytest.raises(ValueError) as error:
        read_model_config(folder)
    assert str(error.value).startswith(f"{folder / 'model.json'}.vision.select_layer: expected ")
