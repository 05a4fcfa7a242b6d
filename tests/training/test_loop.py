import dataclasses
import json
import logging
import math
import shutil

import jax
import numpy as np
import pytest

from moddistill.convert.resolve import load
from moddistill.data.pipeline import Batches
from moddistill.data.tokenizer import load_tokenizer
from moddistill.distributed import sharding
from moddistill.errors import UserError
from moddistill.params import flatten
from moddistill.storage.model_folder import save_model
from moddistill.training import loading, loop
from moddistill.training.architectures import resolve_models
from moddistill.training.metrics import read_metrics
from moddistill.training.streams import row_spec

NORMS = ("grad_norm", "param_norm")
CONTENT = ("samples", "padding", "supervised")
TIMING = ("seconds", "tokens_per_second", "student_tflops", "teacher_tflops")


def rows(workdir):
    """The rows of a run without what the clock says."""
    found = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in found]


PARTS = {
    "sft": {"ce"},
    "init": {"ce"},
    "d2d": {"kd"},
    "d2s": {"kd", "ce", "balance", "dropped"},
    "preference": {
        "preference",
        "reward_chosen",
        "reward_rejected",
        "reward_margin",
        "reward_accuracy",
    },
}


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """`finished(stage)`: the config and the workdir of the stage's whole run."""
    runs = {}

    def run(stage):
        if stage not in runs:
            config = tiny_config(stage, remat="full" if stage == "init" else "none")
            workdir = tmp_path_factory.mktemp(stage)
            loop.train(config, workdir)
            runs[stage] = config, workdir
        return runs[stage]

    return run


@pytest.mark.parametrize(("mean", "color"), [(0.25, 63), (None, 122)])
def test_images_are_padded_with_the_mean_of_the_vision_encoder(
    mean, color, tiny_config, tiny_architecture, init, tokenizer, tmp_path
):
    config = tiny_architecture()
    if mean:
        tower = dataclasses.replace(config.vision, mean=(mean, mean, mean))
        config = dataclasses.replace(config, vision=tower)
    save_model(tmp_path / "model", config, init(config), tokenizer, {})
    stage = tiny_config("sft", student=str(tmp_path / "model"), tokenizer="")
    tower = resolve_models(stage).student_config.vision
    assert row_spec(stage, stage.data, tower).images.pad_color[0] == color


@pytest.mark.parametrize("stage", PARTS)
def test_stage_runs_and_reports_its_parts(stage, finished):
    config, workdir = finished(stage)
    written = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in written] == [1, 2, 3, 4]
    for row in written:
        assert set(row) == {"step", "loss", "lr", *NORMS, *CONTENT, *TIMING} | PARTS[stage]
        assert all(map(math.isfinite, row.values()))
    assert {path.name for path in workdir.iterdir()} == {
        "config.json", "models.json", "sources.json", "metrics.jsonl", "tensorboard",
        ".lock", "checkpoints", "model",
    }  # fmt: skip
    assert json.loads((workdir / "config.json").read_text())["stage"] == stage
    model, _ = load(workdir / "model")
    assert (model.config.decoder.moe is not None) == (stage == "d2s")
    assert model.config.template == config.data.template


def test_interrupted_run_resumes_bit_for_bit(finished, tmp_path, monkeypatch):
    """Stopped in its fourth step: three rows are written, the last checkpoint is of step 2."""
    config, whole = finished("d2s")
    put_batch, calls = sharding.put_batch, []

    def put_three(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return put_batch(*args)

    monkeypatch.setattr(sharding, "put_batch", put_three)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path)
    assert len(rows(tmp_path)) == 3
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(sharding, "put_batch", put_batch)
    loop.train(config, tmp_path)
    assert rows(tmp_path) == rows(whole)
    ours, theirs = (flatten(load(workdir / "model")[1]) for workdir in (tmp_path, whole))
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


def test_only_trainable_parameters_change(finished, tiny_config, tmp_path):
    """d2s trains experts, routers and projector; the rest is what the seed made it."""
    _, workdir = finished("d2s")
    _, after = load(workdir / "model")
    config = tiny_config("d2s", remat="none", optim={"lr": 0.0})
    loop.train(config, tmp_path)
    before = flatten(load(tmp_path / "model")[1])
    moved = {path for path, x in flatten(after).items() if np.any(x != before[path])}
    assert moved == {path for path in before if "/moe/" in path or path.startswith("projector/")}


def test_finished_run_is_not_changed(finished, monkeypatch):
    config, workdir = finished("sft")
    before = {p: p.stat().st_mtime_ns for p in (workdir / "model").rglob("*")}
    monkeypatch.setattr(loop, "prepare", None)
    assert loop.train(config, workdir) == workdir / "model"
    assert before == {p: p.stat().st_mtime_ns for p in (workdir / "model").rglob("*")}


def test_missing_image_root_is_found_before_any_model_is_loaded(finished, tmp_path, monkeypatch):
    config, _ = finished("preference")
    [source] = config.data.sources.values()
    heldout = dataclasses.replace(source, images="no/such/folder")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, heldout=heldout), heldout_steps=1
    )
    monkeypatch.setattr(loop, "prepare", None)
    said = r"^config\.data\.heldout: image folder of .* got 'no/such/folder'"
    with pytest.raises(ValueError, match=said):
        loop.train(config, tmp_path)


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_records_with_images_need_a_student_with_a_vision_encoder(
    stage, tiny_config, tiny_architecture, init, tokenizer, tmp_path, monkeypatch
):
    blind = dataclasses.replace(tiny_architecture(), vision=None)
    save_model(tmp_path / "text", blind, init(blind), tokenizer, {})
    config = tiny_config(stage, student=str(tmp_path / "text"), tokenizer="")
    [name] = config.data.sources
    monkeypatch.setattr(loop, "prepare", None)
    said = rf"^config\.data\.sources\.{name}: .*vision=.*, got images in 8 of 8 records"
    with pytest.raises(ValueError, match=said):
        loop.train(config, tmp_path / "run")


def test_records_left_out_are_counted(finished, tmp_path, caplog):
    config, _ = finished("sft")
    [source] = config.data.sources.values()
    with open(source.path) as file:
        records = json.load(file)
    records[2]["conversations"][1]["value"] = ""
    records[5]["image"] = "gone.png"
    (tmp_path / "records.json").write_text(json.dumps(records))
    source = dataclasses.replace(source, path=str(tmp_path / "records.json"))
    data = dataclasses.replace(config.data, sources={"some": source}, max_rejected=0.3)
    with caplog.at_level(logging.WARNING, "moddistill"):
        loop.train(dataclasses.replace(config, data=data), tmp_path / "run")
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    reasons = {item["line"]: item["reason"] for item in map(json.loads, lines)}
    assert reasons.keys() == {3, 6}
    assert reasons[3] == "answer: expected a text that is not blank, got ''"
    assert "gone.png: expected a readable image" in reasons[6]
    assert "2 records left out" in caplog.text
    assert "sources.some: 1 of 8 records are left out (1 x expected a text" in caplog.text


def test_bad_records_end_a_run_that_saves_what_it_has_done(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("sft", steps=4, save_every=4)
    take, taken = Batches.__next__, []

    def fail(batches):
        taken.append(batches)
        if len(taken) == 3:
            raise UserError("too many are bad")
        return take(batches)

    with monkeypatch.context() as patched, pytest.raises(UserError, match="too many are bad"):
        patched.setattr(Batches, "__next__", fail)
        loop.train(config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    loop.train(config, tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1] == 4


def test_run_interrupted_before_its_model_is_written_can_be_finished(
    finished, tmp_path, monkeypatch
):
    config, whole = finished("preference")
    [source] = config.data.sources.values()
    data = dataclasses.replace(config.data, heldout=source)
    config = dataclasses.replace(config, data=data, heldout_steps=1)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop, "save_model", fail)
        loop.train(config, tmp_path)
    loop.train(config, tmp_path)
    assert rows(tmp_path)[:4] == rows(whole)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 4]


def test_the_step_is_compiled_once(finished, monkeypatch, tmp_path):
    config, _ = finished("sft")
    runs, prepare = [], loop.prepare
    monkeypatch.setattr(loop, "prepare", lambda *args: runs.append(prepare(*args)) or runs[-1])
    loop.train(config, tmp_path)
    assert runs[0].step._cache_size() == 1
    assert jax.tree.all(jax.tree.map(lambda x: x.is_deleted(), runs[0].state.params))


def test_shared_vision_encoder_runs_once_for_both_models(
    tiny_config, tiny_models, tmp_path, monkeypatch, caplog
):
    """The student has the teacher's own encoder, and another decoder; sharing changes no number."""
    folder = str(tiny_models["teacher"])
    model, params = load(folder)
    params["decoder"] = jax.tree.map(lambda x: 1.2 * x, params["decoder"])
    student = str(tmp_path / "student")
    save_model(tmp_path / "student", model.config, params, load_tokenizer(folder), {})
    config = tiny_config(
        "d2d", student=student, teacher=folder, tokenizer="", steps=2, remat="none"
    )
    with caplog.at_level(logging.INFO, logger="moddistill"):
        loop.train(config, tmp_path / "shared")
    assert "gets the features of the student's vision encoder" in caplog.text
    monkeypatch.setattr(loading, "same_tower", lambda *_: False)
    loop.train(config, tmp_path / "apart")
    for shared, apart in zip(rows(tmp_path / "shared"), rows(tmp_path / "apart"), strict=True):
        assert shared == pytest.approx(apart, rel=1e-4, abs=1e-6)
    work = [read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("shared", "apart")]
    shared, apart = (row["teacher_tflops"] / row["student_tflops"] for row in work)
    assert shared < apart


def test_profiled_steps_leave_a_trace(tiny_config, tmp_path):
    config = tiny_config("sft", profile_steps=(2, 3))
    loop.train(config, tmp_path)
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_a_damaged_model_is_not_taken_for_a_finished_one(finished, tmp_path):
    config, whole = finished("sft")
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    next((tmp_path / "model").rglob("manifest.ocdbt")).write_bytes(b"")
    with pytest.raises(UserError, match=r"expected an undamaged model, or none, .*manifest\.ocdbt"):
        loop.train(config, tmp_path)
    shutil.rmtree(tmp_path / "model")
    loop.train(config, tmp_path)
    assert rows(tmp_path) == rows(whole)


def test_a_model_of_another_run_is_not_taken_for_its_own(finished, tiny_config, tmp_path):
    config, whole = finished("sft")
    loop.train(tiny_config("sft", seed=3), tmp_path / "other")
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.copytree(tmp_path / "other" / "model", tmp_path / "run" / "model")
    with pytest.raises(UserError, match="/run/model: expected the model that the run in"):
        loop.train(config, tmp_path / "run")
