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
from moddistill.errors import UserError
from moddistill.extraction.run import extract
from moddistill.teachers.cache import TeacherCache
from moddistill.training.loop import train
from tests.extraction.runs import losses_and_params


@pytest.mark.slow
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


@pytest.mark.slow
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
        ({"data": {"max_length": 192}}, r"data.max_length 192 instead of 200"),
        ({"data": {"max_pixels": 10**6}}, r"data.max_pixels 1000000 instead of 67108864"),
        ({"data": {"exif": "ignore"}}, r"data.exif 'ignore' instead of 'apply'"),
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
