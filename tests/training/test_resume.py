"""A run that resumes with settings that differ from those it began with."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from moddistill.config import TrainConfig
from moddistill.convert.resolve import load
from moddistill.data.quarantine import Quarantine, Rejected
from moddistill.distributed import sharding
from moddistill.params import flatten
from moddistill.storage.atomic_dir import write_folder
from moddistill.storage.model_folder import VERSION, read_source
from moddistill.training import loop, resume
from moddistill.training.metrics import read_metrics
from moddistill.training.resume import write_settings


def with_fields(config, **changes):
    """The config with other fields; a dict changes a part's."""
    for name, value in changes.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(config, name), **value)
        config = dataclasses.replace(config, **{name: value})
    return config


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """`finished(stage)`: the config and the workdir of a whole run of four steps."""
    runs = {}

    def run(stage):
        if stage not in runs:
            config = tiny_config(stage, batch_size=16, remat="none", donate=True)
            runs[stage] = config, tmp_path_factory.mktemp(stage)
            loop.train(*runs[stage])
        return runs[stage]

    return run


@pytest.fixture
def halfway(finished, tmp_path):
    """`halfway(stage)`: the config and a workdir in which the run was killed after two steps."""

    def copy(stage):
        config, whole = finished(stage)
        workdir = tmp_path / "halfway"
        shutil.copytree(whole / "checkpoints" / "2", workdir / "checkpoints" / "2")
        for name in ("config.json", "models.json", "sources.json", "metrics.jsonl"):
            shutil.copy(whole / name, workdir)
        return config, workdir

    return copy


def curve(workdir, name="loss"):
    return [row[name] for row in read_metrics(workdir / "metrics.jsonl")]


def steps(workdir):
    return [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("d2d", {"grad_accum_steps": 2, "teacher_offload": True}),
        ("d2s", {"scan": False, "mesh": {"data": 1, "fsdp": 2, "expert": 4}}),
        (
            "d2s",
            {
                "remat": "full",
                "donate": False,
                "log_every": 2,
                "logits_chunk_size": 64,
                "data": {"workers": 2},
                "expert_transport": "all_to_all",
            },
        ),
    ],
)
def test_settings_of_memory_and_speed_may_change_and_the_result_does_not(
    stage, changes, finished, halfway, caplog
):
    _, whole = finished(stage)
    config, workdir = halfway(stage)
    with caplog.at_level(logging.INFO, "moddistill"):
        loop.train(with_fields(config, **changes), workdir)
    for name in changes:
        assert f"resumed with another setting: config.{name}" in caplog.text
    assert curve(workdir)[:2] == curve(whole)[:2]
    last = [read_metrics(run / "metrics.jsonl")[-1] for run in (workdir, whole)]
    assert last[0]["step"] == last[1]["step"] == 4
    mean = np.mean(curve(whole)[2:]) if "log_every" in changes else curve(whole)[3]
    np.testing.assert_allclose(last[0]["loss"], mean, rtol=1e-5)
    ours, theirs = (flatten(load(run / "model")[1]) for run in (workdir, whole))
    for path, value in theirs.items():
        np.testing.assert_allclose(ours[path], value, atol=1e-4, err_msg=path)


def test_every_setting_that_may_change_is_one_of_the_config():
    settings = {name.replace("/", ".") for name in flatten(dataclasses.asdict(TrainConfig()))}
    settings |= {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(resume._FREE) <= settings
    assert set(resume._EFFECTS) <= set(resume._FREE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"seed 1 instead of 0"),
        ({"batch_size": 32}, r"batch_size 32 instead of 16"),
        ({"optim": {"lr": 0.5}}, r"optim\.lr 0\.5 instead of 0\.001"),
        ({"teacher_quantization": "int8"}, r"teacher_quantization 'int8' instead of 'none'"),
    ],
)
def test_settings_that_change_the_result_may_not_change_on_resume(changes, message, halfway):
    config, workdir = halfway("d2d")
    said = (
        "^--workdir: expected the settings .* of which steps, epochs, grad_accum_steps.* may "
        rf"change, got {message}$"
    )
    with pytest.raises(ValueError, match=said):
        loop.train(with_fields(config, **changes), workdir)


def test_any_setting_may_change_before_the_first_checkpoint(tiny_config, tmp_path, monkeypatch):
    """Out of memory at the first step; nothing of the dead run stays."""

    def fail(*_):
        raise MemoryError

    dead = tiny_config("sft", seed=1, optim={"lr": 0.5})
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(sharding, "put_batch", fail)
        loop.train(dead, tmp_path)
    assert (tmp_path / "config.json").exists()
    Quarantine(str(tmp_path / "quarantine.jsonl")).add([Rejected("a.json", 1, "of the dead run")])
    loop.train(tiny_config("sft", batch_size=16, steps=2), tmp_path)
    assert steps(tmp_path) == [1, 2]
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 16
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.slow
def test_finished_run_continues_with_more_steps(finished, tmp_path, monkeypatch):
    config, whole = finished("d2d")
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    longer = dataclasses.replace(config, steps=6)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop, "save_model", fail)
        loop.train(longer, workdir)
    assert read_source(workdir / "model")["steps"] == 4  # until there is another one
    loop.train(longer, workdir)
    assert read_source(workdir / "model")["steps"] == 6
    assert steps(workdir) == [1, 2, 3, 4, 5, 6]
    assert curve(workdir)[:4] == curve(whole)
    assert curve(workdir, "lr")[4:] == pytest.approx(
        [float(loop.schedule(config.optim, 6)(step)) for step in (4, 5)]
    )
    monkeypatch.setattr(loop, "prepare", None)
    loop.train(longer, workdir)  # is finished
    with pytest.raises(ValueError, match=r"config\.steps: expected >= 6, .* has made, got 4$"):
        loop.train(config, workdir)


def test_a_model_that_may_not_be_replaced_is_found_before_the_first_step(
    finished, tmp_path, monkeypatch
):
    config, whole = finished("d2d")
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "model" / "README.md").write_text("mine")
    monkeypatch.setattr(loop, "prepare", None)
    assert loop.train(config, workdir) == workdir / "model"  # is finished
    said = (
        r"/run/model'?: expected .*remove or rename this one.*README\.md is not in digests\.json$"
    )
    with pytest.raises(ValueError, match=said):
        loop.train(dataclasses.replace(config, steps=6), workdir)
    assert steps(workdir) == [1, 2, 3, 4]


def test_a_model_that_another_command_wrote_is_found_before_the_first_step(
    tiny_config, tmp_path, monkeypatch
):
    with write_folder(tmp_path / "model", "import", overwrite=False) as tmp_dir:
        description = {"version": VERSION, "architecture": {}, "source": {}}
        (tmp_dir / "model.json").write_text(json.dumps(description))
    monkeypatch.setattr(loop, "prepare", None)
    with pytest.raises(
        ValueError, match=r"model': expected .* rename this one\), got one that import wr"
    ):
        loop.train(tiny_config("sft"), tmp_path)


def test_quarantine_file_without_a_run_is_not_overwritten(tiny_config, tmp_path):
    (tmp_path / "quarantine.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"not one with quarantine\.jsonl but no config\.json"):
        loop.train(tiny_config("sft"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["quarantine.jsonl"]
    assert (tmp_path / "quarantine.jsonl").read_text() == "mine\n"


def test_a_run_that_ended_before_its_model_was_loaded_can_be_started_again(
    tiny_config, tmp_path, monkeypatch
):
    """One record breaks the format, which is noted first."""

    def fail(*_):
        raise MemoryError

    config = tiny_config("sft", steps=1)
    [source] = config.data.sources.values()
    records = [{}, *json.loads(Path(source.path).read_text())]
    (tmp_path / "records.json").write_text(json.dumps(records))
    broken = dataclasses.replace(source, path=str(tmp_path / "records.json"))
    data = {"sources": {"some": broken}, "max_rejected": 0.2}
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(loop, "prepare", fail)
        loop.train(with_fields(config, data=data), workdir)
    assert (workdir / "quarantine.jsonl").exists()
    loop.train(config, workdir)
    assert steps(workdir) == [1]
    assert not (workdir / "quarantine.jsonl").exists()


def test_change_of_steps_is_logged_with_its_effect(halfway, caplog):
    config, workdir = halfway("d2d")
    with caplog.at_level(logging.INFO, "moddistill"):
        loop.train(dataclasses.replace(config, steps=3), workdir)
    assert "config.steps: 4 before, 3 now; warm-up and decay are those of the new" in caplog.text
    assert steps(workdir) == [1, 2, 3]


def test_finished_run_without_checkpoints_cannot_continue(finished, tmp_path):
    config, whole = finished("d2d")
    shutil.copytree(whole / "model", tmp_path / "model")
    shutil.copy(whole / "config.json", tmp_path)
    assert loop.train(config, tmp_path) == tmp_path / "model"
    message = r"config\.steps: expected 4, since .* is finished and has no checkpoint, got 6$"
    with pytest.raises(ValueError, match=message):
        loop.train(dataclasses.replace(config, steps=6), tmp_path)


@pytest.mark.parametrize("text", ["", "[3]", '{"steps": 4'])
def test_workdir_with_unreadable_settings_is_refused(text, halfway):
    config, workdir = halfway("d2d")
    (workdir / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"or that of a run with its settings in config\.json, got"
    ):
        loop.train(config, workdir)


def test_run_does_not_resume_from_a_checkpoint_of_another_architecture(finished, tmp_path):
    config, whole = finished("d2s")
    other = with_fields(config, moe={"num_experts": 2})
    write_settings(other, tmp_path)
    for name in ("models.json", "sources.json"):
        shutil.copy(whole / name, tmp_path)
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"checkpoint .*/4 does not fit the architecture") as error:
        loop.train(other, tmp_path)
    assert "experts_up has shape (2, 4, 16, 32), expected (2, 2, 16, 32)" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(("profiled", "traced"), [((1, 3), True), ((1, 2), False)])
def test_profiled_steps_before_the_resumed_step_are_skipped(profiled, traced, halfway):
    config, workdir = halfway("d2d")
    loop.train(dataclasses.replace(config, profile_steps=profiled), workdir)
    assert (workdir / "profile").exists() == traced
