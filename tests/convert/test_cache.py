"""Hugging Face folders where a model folder is expected."""

import dataclasses
import json
import os

import numpy as np
import pytest

import moddistill
from moddistill import generate
from moddistill.convert.importing import import_model
from moddistill.convert.resolve import as_model_folder
from moddistill.models.vlm import Vlm
from moddistill.storage.model_folder import read_model_config
from moddistill.training import loop
from tests.convert import hf_folders as hf


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moddistill"


@pytest.fixture
def llava(tmp_path, tokenizer):
    """A LLaVA with the tokenizer of the `:tiny` records; its images are four tokens."""
    model = hf.llava(hf.Text(tied=False).config(), hf.clip_config(), tokenizer.image_id)
    return hf.save(model, tmp_path / "llava", tokenizer)


def test_folder_is_imported_once_until_it_changes(llava, cache):
    model, params = moddistill.load(llava)
    assert isinstance(model, Vlm)
    [folder] = cache.iterdir()
    before = (folder / "model.json").stat().st_mtime_ns
    again = moddistill.load(llava)[1]
    np.testing.assert_array_equal(again["decoder"]["embedding"], params["decoder"]["embedding"])
    assert (folder / "model.json").stat().st_mtime_ns == before
    os.utime(llava / "model.safetensors", ns=(1, 1))
    assert as_model_folder(llava) != folder
    assert len(list(cache.iterdir())) == 2


@pytest.mark.slow
def test_generate_accepts_a_hugging_face_folder(llava, capsys, tmp_path, tiny_config):
    [source] = tiny_config("sft").data.sources.values()
    image = f"{source.images}/0.png"
    generate.main(
        ["--model", str(llava), "--image", image, "--prompt", "what?", "--max_new_tokens", "2"]
        + ["--json"]
    )
    answer = json.loads(capsys.readouterr().out)
    config = read_model_config(as_model_folder(llava))
    assert answer["prompt_ids"].count(config.image_token_id) == 4
    assert len(answer["token_ids"]) <= 2


@pytest.mark.slow
def test_student_and_teacher_of_a_stage_may_be_hugging_face_folders(
    llava, tiny_config, tmp_path, tokenizer
):
    teacher = hf.llava(
        hf.Text(hidden_size=56, num_heads=14, num_kv_heads=2, tied=False).config(),
        hf.clip_config(),
        tokenizer.image_id,
    )
    hf.save(teacher, tmp_path / "teacher", tokenizer)
    config = tiny_config(
        "d2d",
        student=str(llava),
        teacher=str(tmp_path / "teacher"),
        tokenizer="",
        steps=1,
        data={"template": "chatml"},
    )
    folder = loop.train(dataclasses.replace(config, save_every=1), tmp_path / "run")
    assert read_model_config(folder).decoder.hidden_size == 32


def test_name_that_is_neither_folder_nor_hub_name_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected a model folder, .* got .* without model\.json"):
        moddistill.load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"can be downloaded, got 'org/name' \("):
        moddistill.load("org/name")


def test_concurrent_import_by_another_run_is_used(llava, cache, monkeypatch):
    def slow(source, folder):
        import_model(source, folder)
        import_model(source, folder)

    monkeypatch.setattr("moddistill.convert.cache.import_model", slow)
    assert as_model_folder(llava).parent == cache
