"""Extraction and training from its cache, against the live teacher; interruption; bad caches."""

import dataclasses
import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from moddistill.config import CacheConfig
from moddistill.convert.resolve import load
from moddistill.data.tokenizer import train_bpe
from moddistill.errors import UserError
from moddistill.extraction import batches, plan
from moddistill.extraction.run import extract
from moddistill.models.presets import preset, with_vocabulary
from moddistill.models.vocabulary import num_ids
from moddistill.storage.model_folder import save_model
from moddistill.teachers import cache as caches
from moddistill.teachers.cache import TeacherCache
from moddistill.training.loop import train


@pytest.fixture(scope="module")
def small_shards():
    """Shards of three records, so that a few records have several."""
    patch = pytest.MonkeyPatch()
    for module in (caches, plan):
        patch.setattr(module, "SHARD_RECORDS", 3)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def cached(tiny_config, tokenizer, tmp_path_factory, small_shards):
    """`cached(stage, wanted, **changes)`: the folder of a cache, made once."""
    made = {}

    def make(stage, wanted=None, **changes):
        wanted = wanted or CacheConfig("top_k", num_ids(tokenizer.real_ids))
        key = repr((stage, wanted, changes))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("cache") / stage
            extract(tiny_config(stage, **changes), wanted, made[key])
        return made[key]

    return make


def losses_and_params(config, workdir):
    train(config, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    _, params = load(workdir / "model")
    names = ("loss", "kd", "ce", "preference", "reward_margin", "grad_norm")
    return [{name: row[name] for name in names if name in row} for row in rows], params


@pytest.mark.parametrize("stage", ["d2d", "d2s", "preference"])
def test_a_cache_of_all_ids_trains_like_the_live_teacher(tiny_config, cached, tmp_path, stage):
    live = tiny_config(stage, log_every=1)
    from_cache = dataclasses.replace(live, teacher=f"cache:{cached(stage)}")
    found = losses_and_params(from_cache, tmp_path / "cached")
    expected = losses_and_params(live, tmp_path / "live")
    assert len(found[0]) == live.steps and found[0][0]["loss"] > 0
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", [CacheConfig("top_k", 8), CacheConfig("samples", 8)], ids=str)
def test_entries_depend_on_the_records_only(tiny_config, cached, tmp_path, wanted):
    """Not on packing, the order of rows, or devices."""
    folder = cached("d2s", wanted)
    other = tmp_path / "other"
    changes = {"data": {"packing": False}, "mesh": {"data": 4, "tensor": 2}, "batch_size": 4}
    extract(tiny_config("d2s", **changes), wanted, other)
    a, b = TeacherCache(folder), TeacherCache(other)
    [(name, source)] = a.settings.fingerprint.sources.items()
    for number in range(source.records):
        x, y = a.entry(name, number), b.entry(name, number)
        chex.assert_trees_all_close(x.targets, y.targets, atol=2e-3)


def test_an_interrupted_extraction_makes_the_missing_shards(
    tiny_config, cached, tmp_path, monkeypatch
):
    whole, folder = cached("d2s", CacheConfig("top_k", 8)), tmp_path / "cache"
    written = []

    def write_two(folder, shard, *args, write=batches.write_shard):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(folder, shard, *args)
        written.append(shard.name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batches, "write_shard", write_two)
        extract(tiny_config("d2s"), CacheConfig("top_k", 8), folder)
    with pytest.raises(UserError, match=r"without records 6 to 7 of conversations; the same"):
        TeacherCache(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    assert len(before) == len(written) == 2
    extract(tiny_config("d2s"), CacheConfig("top_k", 8), folder)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    ours = {path.name for path in folder.rglob("*") if path.is_file()}
    assert ours == {path.name for path in whole.rglob("*") if path.is_file()}
    a, b = TeacherCache(folder), TeacherCache(whole)
    for number in range(8):
        first, second = (each.entry("conversations", number) for each in (a, b))
        np.testing.assert_array_equal(first.targets.labels, second.targets.labels)
        chex.assert_trees_all_close(first.targets, second.targets, atol=2e-3)


def test_a_finished_cache_is_checked(tiny_config, cached, tmp_path):
    folder = shutil.copytree(cached("d2s", CacheConfig("top_k", 8)), tmp_path / "cache")
    extract(tiny_config("d2s"), CacheConfig("top_k", 8), folder)
    file = next(folder.glob("*.array_record"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{file.name} does not match digests.json"):
        extract(tiny_config("d2s"), CacheConfig("top_k", 8), folder)


@pytest.mark.parametrize(
    "wanted, changes, message",
    [
        (
            CacheConfig("top_k", 9),
            {},
            r"--out: expected .* same settings.*format.ids 9 instead of 8",
        ),
        (
            CacheConfig("top_k", 10**6),
            {},
            r"ids of the cache: expected <= \d+, the ids of the teacher, got 10",
        ),
        (
            CacheConfig(),
            {"teacher": "cache:x"},
            r"config.teacher: expected a model, .* got 'cache:x'",
        ),
        (
            CacheConfig("top_k", 8),
            {"distillation": {"kd_positions": "all_tokens"}},
            r"config.distillation.kd_positions: expected 'response'",
        ),
        (
            CacheConfig("top_k", 8),
            {"distillation": {"relation_weight": 0.5}},
            r"config.distillation.relation_weight: expected 0.0, since a cache",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tiny_config, cached, tmp_path, wanted, changes, message
):
    folder = shutil.copytree(cached("d2s", CacheConfig("top_k", 8)), tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        extract(tiny_config("d2s", **changes), wanted, folder)


def test_a_stage_without_a_teacher_is_refused(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"config.stage: expected a stage with a teacher"):
        extract(tiny_config("sft"), CacheConfig(), tmp_path / "cache")


def test_a_folder_of_something_else_is_kept(tiny_config, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"--out: expected an empty folder .* 'thesis.tex'"):
        extract(tiny_config("d2s"), CacheConfig(), tmp_path)


def test_an_attempt_that_failed_can_be_repeated(tiny_config, tmp_path):
    """With the list of the records that were left out, which is that of the last attempt."""
    config = tiny_config("d2s", data={"max_length": 180, "max_rejected": 0.0})
    with pytest.raises(UserError, match=r"expected at most 0.0% of 8 records to be left out"):
        extract(config, CacheConfig(ids=8), tmp_path)
    assert (tmp_path / "quarantine.jsonl").read_text().count("\n") > 0
    extract(tiny_config("d2s"), CacheConfig(ids=8), tmp_path)
    assert TeacherCache(tmp_path) and not (tmp_path / "quarantine.jsonl").exists()


def test_held_out_records_have_targets_too(tiny_config, tmp_path):
    config = tiny_config("d2s")
    [source] = config.data.sources.values()
    data = dataclasses.replace(config.data, heldout=source)
    config = dataclasses.replace(config, data=data, heldout_steps=1)
    extract(config, CacheConfig(ids=8), tmp_path / "cache")
    train_from(tmp_path / "cache", config, tmp_path)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "heldout_kd" in rows
    data = dataclasses.replace(data, sources={"heldout": source})
    config = dataclasses.replace(config, data=data)
    with pytest.raises(UserError, match=r"config.data.sources: expected other names than 'held"):
        extract(config, CacheConfig(ids=8), tmp_path / "other")


@pytest.fixture
def teacher_of(init, tokenizer, tmp_path):
    """`teacher_of(**changes)`: the folder of a teacher whose architecture differs from `tiny`."""

    def make(patch_size=14, template="vicuna", tokenizer=tokenizer):
        config = with_vocabulary(preset("tiny-teacher"), tokenizer.real_ids, tokenizer.image_id)
        vision = dataclasses.replace(config.vision, patch_size=patch_size)
        config = dataclasses.replace(config, vision=vision, template=template)
        save_model(tmp_path / "teacher", config, init(config), tokenizer, {})
        return str(tmp_path / "teacher")

    return make


def test_a_teacher_with_other_image_tokens_teaches_from_a_cache(tiny_config, teacher_of, tmp_path):
    """16 image tokens where the student has 4; a live teacher would be refused."""
    teacher = teacher_of(patch_size=7)
    config = tiny_config("d2s", teacher=teacher, data={"max_length": 240})
    extract(config, CacheConfig(ids=8), tmp_path / "cache")
    assert TeacherCache(tmp_path / "cache").settings.teacher.images["tokens"] == 16
    train_from(tmp_path / "cache", config, tmp_path)
    assert taught(tmp_path / "run") == config.steps


def test_a_teacher_of_another_template_teaches_from_a_cache(tiny_config, teacher_of, tmp_path):
    """`chatml` has another end of an answer than `vicuna`, and no space before it."""
    config = tiny_config("d2s", teacher=teacher_of(template="chatml"))
    extract(config, CacheConfig(ids=8), tmp_path / "cache")
    train_from(tmp_path / "cache", config, tmp_path)
    assert taught(tmp_path / "run") == config.steps


def test_a_teacher_of_another_vocabulary_teaches_from_a_cache(tiny_config, teacher_of, tmp_path):
    other = train_bpe(["which shape is this? is it a blue star or a green circle? " * 3], 290)
    config = tiny_config("d2s", teacher=teacher_of(tokenizer=other))
    extract(config, CacheConfig(ids=8), tmp_path / "cache")
    train_from(tmp_path / "cache", config, tmp_path)
    assert taught(tmp_path / "run") == config.steps
    extract(config, CacheConfig("samples", 8), tmp_path / "drawn")
    with pytest.raises(UserError, match=r"config\.teacher: expected a cache made with --top_k for"):
        train_from(tmp_path / "drawn", config, tmp_path / "other")


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


def test_a_run_does_not_resume_with_another_cache(tiny_config, cached, tmp_path):
    folder = shutil.copytree(cached("d2s", CacheConfig("top_k", 8)), tmp_path / "cache")
    config = tiny_config("d2s")
    train_from(folder, config, tmp_path)
    shutil.rmtree(folder)
    shutil.copytree(cached("d2s", CacheConfig("samples", 8)), folder)
    with pytest.raises(UserError, match=r"config.teacher: expected the cache that the run in"):
        train_from(folder, dataclasses.replace(config, steps=6), tmp_path)


def train_from(folder, config, tmp_path):
    return train(dataclasses.replace(config, teacher=f"cache:{folder}"), tmp_path / "run")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": {"max_length": 192}}, r"limits.max_length 192 instead of 200"),
        ({"distillation": {"temperature": 2.0}}, r"temperature 2.0 instead of 1.0"),
        ({"teacher_quantization": "int8"}, r"config.teacher_quantization: expected 'none'"),
        (
            {"distillation": {"kd_positions": "all_tokens"}},
            r"config.distillation.kd_positions: expected 'response', .* a cache",
        ),
    ],
)
def test_a_cache_of_other_settings_is_refused(tiny_config, cached, tmp_path, changes, message):
    folder = cached("d2s", CacheConfig("top_k", 8))
    with pytest.raises(UserError, match=message):
        train_from(folder, tiny_config("d2s", **changes), tmp_path)


def test_a_cache_of_other_records_is_refused(tiny_config, cached, tmp_path, monkeypatch):
    folder, config = cached("d2s", CacheConfig("top_k", 8)), tiny_config("d2s")
    [(name, source)] = config.data.sources.items()
    records = json.loads(Path(source.path).read_text())
    records[0]["conversations"][1]["value"] += " and more"
    (tmp_path / "other.json").write_text(json.dumps(records))
    other = dataclasses.replace(source, path=str(tmp_path / "other.json"))
    data = dataclasses.replace(config.data, sources={name: other})
    message = rf"config.teacher: expected a cache of this run's records.*sources.{name}.content"
    with pytest.raises(UserError, match=message):
        train_from(folder, dataclasses.replace(config, data=data), tmp_path)


def test_drawn_ids_serve_expectations_under_the_teacher_only(tiny_config, cached, tmp_path):
    folder = cached("d2s", CacheConfig("samples", 8))
    config = tiny_config("d2s", distillation={"divergence": "reverse_kl"})
    with pytest.raises(UserError, match=r"distillation.divergence: expected .*forward_kl.*skew_kl"):
        train_from(folder, config, tmp_path)


def test_a_folder_without_a_cache_is_named(tiny_config, tmp_path):
    with pytest.raises(UserError, match=r"config.teacher: expected a folder that .*extract made"):
        train_from(tmp_path, tiny_config("d2s"), tmp_path)


def test_a_damaged_entry_is_no_target(tiny_config, cached, tmp_path):
    """Bits are compared as entries are read; damage never becomes a target."""
    folder = shutil.copytree(cached("d2s", CacheConfig("top_k", 8)), tmp_path / "cache")
    file = sorted(folder.glob("*.array_record"))[0]
    data = bytearray(file.read_bytes())
    where = data.index(b"MDT2") if b"MDT2" in data else 200
    data[where + 20] ^= 4
    file.write_bytes(data)
    config = tiny_config("d2s", data={"max_rejected": 1.0})
    train_from(folder, config, tmp_path)
    listed = (tmp_path / "run" / "without_targets.jsonl").read_text()
    assert "expected undamaged bytes" in listed


def test_preference_pairs_have_two_sums(tiny_config, cached):
    found = TeacherCache(cached("preference"))
    [(name, source)] = found.settings.fingerprint.sources.items()
    assert found.settings.format.kind == "answers"
    for number in range(source.records):
        sums = found.entry(name, number).targets.label_logprobs
        assert sums.shape == (2,) and np.all(sums < 0)
    assert jax.tree.leaves(found.entry(name, 0).targets)
