"""A run resumes only with the models and records that it began with."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.data.tokenizer import train_bpe
from moddistill.errors import UserError
from moddistill.storage.digests import NAME, write_digests
from moddistill.training import loop
from moddistill.training.architectures import resolve_models
from moddistill.training.provenance import check_models, check_sources, write_models
from tests.convert import hf_folders


@pytest.fixture
def source(tiny_models, tmp_path):
    """`source(scale)`: a Hugging Face folder whose weights are multiplied by a number."""

    def make(scale):
        folder = tmp_path / f"source-{scale}"
        if not folder.exists():
            export_model(tiny_models["dense"], folder, max_shard_size=10**9)
            (folder / NAME).unlink()
            hf_folders.change_weights(
                folder, lambda weights: {name: scale * x for name, x in weights.items()}
            )
        return folder

    return make


def test_run_resumes_with_the_same_weights_imported_again(tiny_config, source, tmp_path):
    config = tiny_config("d2d", student=str(tmp_path / "model"), tokenizer="")
    import_model(str(source(1)), tmp_path / "model")
    write_models(resolve_models(config), tmp_path)
    shutil.rmtree(tmp_path / "model")
    import_model(str(source(1)), tmp_path / "model")
    check_models(resolve_models(config), tmp_path)


@pytest.mark.parametrize("setting", ["student", "teacher"])
def test_run_does_not_resume_with_other_weights(setting, tiny_config, source, tmp_path):
    import_model(str(source(1)), tmp_path / "model")
    fields = {"tokenizer": ""} if setting == "student" else {}
    config = tiny_config("d2d", **{setting: str(tmp_path / "model")}, **fields)
    write_models(resolve_models(config), tmp_path)
    import_model(str(source(2)), tmp_path / "model", overwrite=True)
    with pytest.raises(UserError, match=rf"^config\.{setting}: expected the model that the run"):
        check_models(resolve_models(config), tmp_path)


def test_run_does_not_resume_with_another_model_of_a_stage(tiny_config, tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["dense"], tmp_path / "model")
    config = tiny_config("d2d", student=str(folder), tokenizer="")
    write_models(resolve_models(config), tmp_path)
    check_models(resolve_models(config), tmp_path)
    description = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(description))  # without its line breaks
    write_digests(folder, "train")
    with pytest.raises(UserError, match=r"^config\.student: expected the model that the run"):
        check_models(resolve_models(config), tmp_path)


def test_run_does_not_resume_with_another_tokenizer(tiny_config, tmp_path):
    """That of a `random:` student is in no model folder."""
    config = tiny_config("sft")
    models = resolve_models(config)
    write_models(models, tmp_path)
    check_models(models, tmp_path)
    others = models._replace(tokenizer=train_bpe(["another text"], 300))
    with pytest.raises(UserError, match=r"^config\.tokenizer: expected the tokenizer that the run"):
        check_models(others, tmp_path)


@pytest.fixture
def heldout(tiny_config, tmp_path):
    """The config of a run with held-out records of its own, and their folder."""
    [source] = tiny_config("sft").data.sources.values()
    folder = tmp_path / "heldout"
    shutil.copytree(Path(source.path).parent, folder)
    own = dataclasses.replace(source, path=str(folder / Path(source.path).name), images=str(folder))
    config = tiny_config("sft", steps=2, save_every=1, heldout_steps=1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, heldout=own)), folder


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["records", "images"])
def test_run_does_not_resume_with_other_heldout_records_or_images(heldout, tmp_path, changed):
    config, folder = heldout
    loop.train(config, tmp_path / "run")
    path = Path(config.data.heldout.path)
    if changed == "records":
        path.write_text(path.read_text().replace('"value": "', '"value": "so '))
    else:
        for image in sorted(folder.glob("*.png"))[1:]:
            shutil.copy(folder / "0.png", image)
    named = path if changed == "records" else f"images of {path}"
    with pytest.raises(UserError, match=f"^config\\.data: expected .* got '{named}' with other"):
        loop.train(dataclasses.replace(config, steps=4), tmp_path / "run")


def test_resuming_needs_the_record_of_models(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"models\.json"):
        check_models(resolve_models(tiny_config("sft")), tmp_path)


@pytest.fixture
def begun(tmp_path):
    """A workdir with a checkpoint and the digests of two files."""
    check_sources({"a.json": "1" * 64, "b.json": "2" * 64}, tmp_path)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "4" / "digests.json").touch()
    return tmp_path


def test_run_resumes_with_the_same_records(begun):
    check_sources({"b.json": "2" * 64, "a.json": "1" * 64}, begun)


@pytest.mark.parametrize(
    ("digests", "path"),
    [
        ({"a.json": "1" * 64, "b.json": "3" * 64}, "b.json"),
        ({"a.json": "1" * 64}, "b.json"),
        ({"a.json": "1" * 64, "b.json": "2" * 64, "c.json": "4" * 64}, "c.json"),
    ],
)
def test_run_does_not_resume_with_other_records(digests, path, begun):
    message = rf"^config\.data: expected the records .* began with, got '{path}' with other"
    with pytest.raises(UserError, match=message):
        check_sources(digests, begun)


def test_records_may_change_before_the_first_checkpoint(tmp_path):
    check_sources({"a.json": "1" * 64}, tmp_path)
    check_sources({"a.json": "2" * 64}, tmp_path)


def test_resuming_needs_the_record_of_sources(begun):
    (begun / "sources.json").unlink()
    with pytest.raises(UserError, match=r"sources\.json"):
        check_sources({"a.json": "1" * 64}, begun)


@pytest.mark.slow
def test_a_refused_start_changes_nothing(tiny_config, tmp_path):
    """All checkpoints are damaged; mended, the run goes on."""
    config = tiny_config("sft")
    loop.train(config, tmp_path)
    shutil.rmtree(tmp_path / "model")
    digests = [folder / "digests.json" for folder in (tmp_path / "checkpoints").iterdir()]
    contents = [file.read_text() for file in digests]
    for file in digests:
        file.unlink()
    before = (tmp_path / "models.json").read_text()
    with pytest.raises(UserError, match="expected an undamaged checkpoint"):
        loop.train(config, tmp_path)
    assert (tmp_path / "models.json").read_text() == before
    for file, content in zip(digests, contents, strict=True):
        file.write_text(content)
    loop.train(config, tmp_path)
    assert (tmp_path / "model").exists()
