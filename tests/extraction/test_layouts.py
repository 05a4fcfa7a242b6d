"""Teachers whose images, template or vocabulary are not the student's."""

import dataclasses
import json
import os
from pathlib import Path

import chex
import pytest
import tokenizers

from moddistill.config import CacheConfig, MeshConfig
from moddistill.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from moddistill.errors import UserError
from moddistill.extraction.run import extract
from moddistill.models.presets import preset, with_vocabulary
from moddistill.models.vocabulary import num_ids
from moddistill.storage.model_folder import save_model
from moddistill.teachers.cache import TeacherCache
from moddistill.training.loop import train
from tests.extraction.runs import losses_and_params


def train_from(folder, config, tmp_path):
    return train(dataclasses.replace(config, teacher=f"cache:{folder}"), tmp_path / "run")


@pytest.fixture
def teacher_of(init, tokenizer, tmp_path):
    """`teacher_of(**changes)`: the folder of a teacher whose architecture differs from `tiny`."""

    def make(template="vicuna", tokenizer=tokenizer, added="", **changes):
        if added:
            backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
            backend.add_tokens([added])
            tokenizer = Tokenizer(backend)
        config = with_vocabulary(preset("tiny-teacher"), tokenizer.real_ids, tokenizer.image_id)
        vision = dataclasses.replace(config.vision, **changes)
        config = dataclasses.replace(config, vision=vision, template=template)
        save_model(tmp_path / "teacher", config, init(config), tokenizer, {})
        return str(tmp_path / "teacher")

    return make


LAYOUTS = {
    "patches": {"patch_size": 7},  # 16 image tokens where the student has 4
    "image size": {"image_size": 42},
    "template": {"template": "chatml"},  # another end of an answer, and no space before it
    "both": {"patch_size": 7, "template": "chatml"},
    "added token": {"template": "chatml", "added": "yes"},  # which answers have
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["d2s", "preference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_teacher_of_another_layout_teaches_alike_live_and_from_a_cache(
    layout, stage, tiny_config, teacher_of, tmp_path
):
    """A cache of all ids has all that a live teacher knows of answers."""
    # Of packed rows, those of a live teacher have fewer samples.
    data = {"max_length": 240, "packing": False}
    live = tiny_config(stage, teacher=teacher_of(**LAYOUTS[layout]), data=data)
    ids = num_ids(load_tokenizer(live.teacher).real_ids)
    extract(live, CacheConfig("top_k", ids), tmp_path / "cache")
    cached = dataclasses.replace(live, teacher=f"cache:{tmp_path / 'cache'}")
    found = losses_and_params(live, tmp_path / "live")
    expected = losses_and_params(cached, tmp_path / "cached")
    assert len(found[0]) == live.steps and found[0][0]["loss"] > 0
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not {"quarantine.jsonl", "without_targets.jsonl"} & set(os.listdir(tmp_path / "live"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["d2s", "preference"])
def test_a_teacher_of_another_layout_teaches_alike_on_any_mesh(
    stage, tiny_config, teacher_of, tmp_path
):
    """With packed rows."""
    teacher = teacher_of(patch_size=7, template="chatml")
    by_rows = tiny_config(stage, teacher=teacher, data={"max_length": 480})
    mesh = MeshConfig(data=2, expert=2, tensor=2)
    found = losses_and_params(dataclasses.replace(by_rows, mesh=mesh), tmp_path / "mesh")
    expected = losses_and_params(by_rows, tmp_path / "rows")
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_teacher_of_another_vocabulary_teaches_from_a_cache(tiny_config, teacher_of, tmp_path):
    other = train_bpe(["which shape is this? is it a blue star or a green circle? " * 3], 290)
    config = tiny_config("d2s", teacher=teacher_of(tokenizer=other))
    extract(config, CacheConfig(ids=8), tmp_path / "cache")
    train_from(tmp_path / "cache", config, tmp_path)
    assert taught(tmp_path / "run") == config.steps
    by_rank = dataclasses.replace(config.distillation, divergence="uld")
    train_from(
        tmp_path / "cache", dataclasses.replace(config, distillation=by_rank), tmp_path / "uld"
    )
    assert taught(tmp_path / "uld" / "run") == config.steps
    extract(config, CacheConfig("samples", 8), tmp_path / "drawn")
    with pytest.raises(UserError, match=r"config\.teacher: expected a cache made with --top_k for"):
        train_from(tmp_path / "drawn", config, tmp_path / "other")


@pytest.mark.slow
def test_records_of_other_answers_are_trained_without_targets(
    tiny_config, cached, tmp_path, monkeypatch
):
    config = tiny_config("d2s", data={"max_rejected": 1.0})
    monkeypatch.setattr(TeacherCache, "entry", other_entry)
    train_from(cached("d2s", CacheConfig("top_k", 8)), config, tmp_path)
    listed = (tmp_path / "run" / "without_targets.jsonl").read_text()
    assert listed.count("answer: expected ") == 8
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["ce"] > 0 and not row.get("kd") for row in rows)
    monkeypatch.setattr(TeacherCache, "entry", other_entry)
    with pytest.raises(UserError, match=r"records to be without a teacher's targets .*, got "):
        train_from(cached("d2s", CacheConfig("top_k", 8)), tiny_config("d2s"), tmp_path / "other")


def other_entry(cache, source, number, entry=TeacherCache.entry):
    """That of a record, whose answer begins with another letter."""
    found = entry(cache, source, number)
    labels = found.targets.labels.copy()
    labels[0] = labels[0] % 100 + 1
    return found._replace(targets=found.targets._replace(labels=labels))


def taught(workdir):
    """The number of steps with a divergence; no record was left out, or had no targets."""
    lists = {"quarantine.jsonl", "without_targets.jsonl"}
    assert not lists & {path.name for path in workdir.iterdir()}
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return sum(row["kd"] > 0 for row in rows)


def test_records_that_do_not_fit_the_teacher_are_found_before_the_first_step(
    tiny_config, teacher_of, tmp_path
):
    teacher = teacher_of(patch_size=2)  # 196 image tokens where the student has 4
    config = tiny_config("d2s", teacher=teacher, data={"max_length": 200, "packing": False})
    expected = "config.teacher: config.data.sources.conversations: .* within data.max_length 200"
    with pytest.raises(UserError, match=expected):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_record_that_only_the_student_has_place_for_is_trained_without_targets(
    tiny_config, teacher_of, tmp_path
):
    """The cache is of the same records and images, though the teacher leaves one of them out."""
    data = {"max_length": 400, "max_images": 2, "packing": False, "max_rejected": 0.5}
    config = tiny_config("d2s", teacher=teacher_of(patch_size=2), data=data)
    [(name, source)] = config.data.sources.items()
    records = json.loads(Path(source.path).read_text())
    [first, *_] = [record for record in records if "image" in record]
    image, question = first["image"], first["conversations"][0]
    first["image"], question["value"] = [image, image], "<image>" + question["value"]
    (tmp_path / "records.json").write_text(json.dumps(records))
    source = dataclasses.replace(source, path=str(tmp_path / "records.json"))
    data = dataclasses.replace(config.data, sources={name: source})
    config = dataclasses.replace(config, data=data)
    extract(config, CacheConfig("top_k", 8), tmp_path / "cache")
    train_from(tmp_path / "cache", config, tmp_path)
    listed = (tmp_path / "run" / "without_targets.jsonl").read_text()
    assert "left out of the teacher's records" in listed
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()
