"""Invalid generation settings of a source."""

import json
import logging

import pytest
from transformers import GenerationConfig

from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.source_settings import merge_generation, read_generation
from moddistill.storage.digests import write_digests
from tests.convert import hf_folders as hf

IDS = "a token id or a list of them, whole numbers from 0"
VALUES = "finite numbers and text in UTF-8, nested at most 20 times"
DEEP = "[" * 21 + "]" * 21


@pytest.mark.parametrize(
    ("text", "field", "shown", "expected"),
    [
        ('{"temperature": 1e999}', "temperature", "inf", "a number >= 0"),
        ('{"temperature": "hot"}', "temperature", "'hot'", "a number >= 0"),
        ('{"top_p": 1.5}', "top_p", "1.5", "a number >= 0 and <= 1"),
        ('{"top_k": 2.5}', "top_k", "2.5", "an integer >= 0"),
        ('{"max_new_tokens": -5}', "max_new_tokens", "-5", "an integer >= 1"),
        ('{"a": NaN}', "a", "nan", VALUES),
        ('{"a": {"b": [0, -Infinity]}}', "a", "{'b': [0, -inf]}", VALUES),
        ('{"a": "\\ud800"}', "a", r"'\ud800'", VALUES),
        ('{"\\ud800\\n": 1}', r"\ud800\n", "1", VALUES),
        (f'{{"a": {DEEP}}}', "a", "[[[[[[[...]]]]]]]", VALUES),
        (f'{{"eos_token_id": {DEEP}}}', "eos_token_id", "[[[[[[[...]]]]]]]", IDS),
        ('{"suppress_tokens": "x"}', "suppress_tokens", "'x'", IDS),
        ('{"suppress_tokens": [-5]}', "suppress_tokens", "[-5]", IDS),
        ('{"begin_suppress_tokens": [1.5]}', "begin_suppress_tokens", "[1.5]", IDS),
        ('{"eos_token_id": true}', "eos_token_id", "True", IDS),
        ('{"bos_token_id": {}}', "bos_token_id", "{}", IDS),
    ],
)
def test_generation_setting_that_is_no_valid_json_is_refused(
    text, field, shown, expected, tmp_path
):
    file = tmp_path / "generation_config.json"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        read_generation(tmp_path)
    assert str(error.value) == f"{file}: {field}: expected {expected}, got {shown}"


def test_generation_settings_of_published_models_are_read_unchanged(tmp_path):
    settings = {
        "bos_token_id": None,
        "eos_token_id": [299, 7],
        "pad_token_id": 0,
        "suppress_tokens": [],
        "temperature": 0.7,
        "max_new_tokens": 77,
        "stop_strings": ["\N{BULLET}"],
        "nested": json.loads("[" * 20 + "]" * 20),
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert read_generation(tmp_path) == settings


@pytest.fixture(scope="module")
def language(tmp_path_factory, small_tokenizer):
    model = hf.Text(num_layers=1).model()
    return hf.save(model, tmp_path_factory.mktemp("language") / "hf", small_tokenizer)


def test_ids_without_a_row_are_dropped_and_logged(language, tmp_path, small_tokenizer, caplog):
    end, first = small_tokenizer.special("<|im_end|>"), small_tokenizer.image_id
    caplog.set_level(logging.INFO, "moddistill")
    settings = {
        "bos_token_id": 320,
        "eos_token_id": [end, 999_999],
        "suppress_tokens": [5, 320],
        "begin_suppress_tokens": [319, 400],
    }
    (language / "generation_config.json").write_text(json.dumps(settings))
    import_model(str(language), tmp_path / "model", template="chatml")
    options = {"max_shard_size": 10**9, "vocabulary": "padded"}
    export_model(tmp_path / "model", tmp_path / "out", **options)
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    suppressed = [5, *range(first, 320)]
    assert (found.bos_token_id, found.eos_token_id) == (None, [end])
    assert found.suppress_tokens == suppressed
    assert found.begin_suppress_tokens == [319]
    assert caplog.messages[-1] == (
        f"changed against {tmp_path / 'model'}: bos_token_id 320 -> None, "
        f"eos_token_id [{end}, 999999] -> [{end}], "
        f"suppress_tokens [5, 320] -> {suppressed!s:.80}, "
        "begin_suppress_tokens [319, 400] -> [319]"
    )


def test_preserved_and_null_settings_are_not_replaced():
    computed = {"eos_token_id": 3, "pad_token_id": 4, "do_sample": False, "suppress_tokens": [9]}
    source = {"eos_token_id": [3, 4], "pad_token_id": None, "suppress_tokens": [1], "top_k": None}
    merged, replaced = merge_generation(computed, source, rows=10)
    assert merged == {
        "eos_token_id": [3, 4],
        "pad_token_id": 4,
        "do_sample": False,
        "suppress_tokens": [1, 9],
        "top_k": None,
    }
    assert replaced == []


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("temperature", float("inf"), "a number >= 0"), ("eos_token_id", "x", IDS)],
)
def test_invalid_generation_settings_in_model_json_are_refused(
    name, value, expected, language, tmp_path
):
    (language / "generation_config.json").unlink(missing_ok=True)
    import_model(str(language), tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    fields = json.loads(file.read_text())
    fields["source"]["imported"]["generation"] = {name: value}
    file.write_text(json.dumps(fields))
    write_digests(tmp_path / "model", "import")
    with pytest.raises(ValueError) as error:
        export_model(tmp_path / "model", tmp_path / "out", max_shard_size=10**9)
    assert str(error.value) == (
        f"{file}: source.imported.generation.{name}: expected {expected}, got {value!r}"
    )
    assert not (tmp_path / "out").exists()
