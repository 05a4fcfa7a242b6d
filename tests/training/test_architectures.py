"""The models of a run: each spec is resolved once."""

import dataclasses
from collections import Counter

import pytest

from moddistill.convert import resolve
from moddistill.convert.exporting import export_model
from moddistill.errors import UserError
from moddistill.planning.planner import architectures
from moddistill.storage import model_folder
from moddistill.storage.model_folder import save_model
from moddistill.training import loop
from moddistill.training.architectures import resolve_models


@pytest.mark.slow
def test_run_imports_and_reads_each_model_once(
    tiny_config, tiny_architecture, tiny_models, init, tokenizer, tmp_path, monkeypatch
):
    language = dataclasses.replace(tiny_architecture(), vision=None)
    save_model(tmp_path / "language", language, init(language), tokenizer, {})
    export_model(tiny_models["teacher"], tmp_path / "teacher-hf", max_shard_size=10**9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    imports, reads = Counter(), Counter()
    imported, check_architecture = resolve.import_once, model_folder.check_architecture

    def count_import(name):
        imports[name] += 1
        return imported(name)

    def count_read(config, origin):
        reads[origin] += 1
        return check_architecture(config, origin)

    monkeypatch.setattr(resolve, "import_once", count_import)
    monkeypatch.setattr(model_folder, "check_architecture", count_read)
    config = tiny_config(
        "d2d",
        student=str(tmp_path / "language"),
        vision=str(tiny_models["teacher"]),
        teacher=str(tmp_path / "teacher-hf"),
        tokenizer="",
        steps=1,
    )
    loop.train(config, tmp_path / "run")
    assert imports == {config.teacher: 1}
    [cached] = (tmp_path / "cache" / "moddistill").iterdir()
    folders = (config.student, config.vision, str(cached))
    assert reads == {f"{folder}/model.json": 1 for folder in folders}


@pytest.mark.parametrize("name", ["image_kd_weight", "relation_weight"])
@pytest.mark.parametrize("find", [resolve_models, architectures])
def test_losses_at_image_positions_need_a_vision_encoder(
    tiny_config, tiny_architecture, tiny_models, init, tokenizer, tmp_path, name, find
):
    language = dataclasses.replace(tiny_architecture(), vision=None)
    save_model(tmp_path / "language", language, init(language), tokenizer, {})
    config = tiny_config(
        "d2d", student=str(tmp_path / "language"), tokenizer="", distillation={name: 0.5}
    )
    expected = rf"^config\.distillation\.{name}: expected 0\.0, .* no vision encoder, got 0\.5$"
    with pytest.raises(UserError, match=expected):
        find(config)
    folder = str(tiny_models["teacher"])
    find(dataclasses.replace(config, vision=folder, teacher=folder))
