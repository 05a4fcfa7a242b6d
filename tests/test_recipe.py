import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import llava_mod, sft
from moddistill import recipe
from moddistill.config import RecipeConfig, TaskConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.errors import UserError
from moddistill.evals import easy_vqa
from moddistill.evals.results import write_jsonl, write_results
from moddistill.reports.results_table import results_table
from moddistill.reports.table import format_table
from moddistill.reports.workdirs import read_workdirs
from moddistill.storage.json_file import write_json
from moddistill.training import loop
from moddistill.training.lock import locked
from moddistill.training.metrics import read_metrics

ANSWERS = {
    "first": ["red", "yes", "yes"],
    "second": ["red", "yes", "no"],
}


def test_the_workdir_is_replaced_in_every_string():
    values = {
        "order": ("a",),
        "stages": {"a": {"student": "{workdir}/b/model", "teacher": "runs/t", "steps": 3}},
    }
    assert recipe.at_workdir(values, "runs/x") == {
        "order": ("a",),
        "stages": {"a": {"student": "runs/x/b/model", "teacher": "runs/t", "steps": 3}},
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": ("a",)}, r"config\.order: expected each of \('a', 'b'\) once, got \('a',\)"),
        ({"order": ("a", "a", "b")}, r"config\.order: expected each of"),
        ({"order": ("a", "c")}, r"config\.order: expected each of"),
        (
            {"evaluated": ("a", "c")},
            r"config\.evaluated: expected stages of \('a', 'b'\), got \('a', 'c'\)",
        ),
        (
            {"evaluated": ("a",)},
            r"config\.evaluated: expected \(\) without config\.tasks, got \('a',\)",
        ),
        (
            {"evaluated": ("a",), "tasks": {"vqa": TaskConfig("easy_vqa", "no/such")}},
            r"^config\.tasks\.vqa\.data: no/such/test\.json: expected a file of",
        ),
        (
            {"tasks": {"vqa": TaskConfig("easyvqa", "data")}},
            r"^config\.tasks\.vqa\.task: expected 'easy_vqa' or .*, got 'easyvqa'",
        ),
    ],
)
def test_order_stages_and_tasks_that_do_not_fit_are_an_error(tmp_path, fields, message):
    stages = {"a": TrainConfig(), "b": TrainConfig()}
    config = RecipeConfig(**{"order": ("a", "b"), "stages": stages} | fields)
    with pytest.raises(ValueError, match=message):
        recipe.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["sources", "heldout"])
def test_missing_records_and_images_of_any_stage_stop_the_recipe_first(tiny_config, tmp_path, part):
    first = tiny_config("sft")
    [source] = first.data.sources.values()
    workdir = tmp_path / "run"

    def run(**fields):
        changed = dataclasses.replace(source, **fields)
        data = {"sources": {"a": changed}} if part == "sources" else {"heldout": changed}
        more = {} if part == "sources" else {"heldout_steps": 1}
        second = dataclasses.replace(first, data=dataclasses.replace(first.data, **data), **more)
        stages = {"first": first, "second": second}
        recipe.run(RecipeConfig(order=tuple(stages), stages=stages), workdir)

    where = rf"^config\.stages\.second\.data\.{'sources.a' if part == 'sources' else 'heldout'}: "
    with pytest.raises(
        ValueError, match=where + r"gone\.json: expected a file, or a pattern of files, got none"
    ):
        run(path="gone.json")
    with pytest.raises(
        ValueError, match=where + r"image folder of .*: expected an existing folder, got 'gone'"
    ):
        run(images="gone")
    assert not workdir.exists()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recipe, "train", interrupt)
        run(path=f"{workdir}/first/made.json")


def test_teachers_and_students_of_the_experiments_share_a_template():
    """A stage's teacher, if the recipe or `sft` trains it, reads the stage's own template."""
    for size in ("full", "demo"):
        config = from_config_dict(RecipeConfig, llava_mod.get_config(size).to_dict())
        teachers = {config.stages[name].teacher for name in ("d2d", "d2s", "preference")}
        [teacher] = teachers
        made = re.fullmatch(r"\{workdir\}/(.+)/model", teacher)
        maker = config.stages[made[1]] if made else from_sft(teacher)
        for name in ("d2d", "d2s", "preference"):
            assert config.stages[name].data.template == maker.data.template


def from_sft(folder):
    """The settings with which `experiments/sft.py` trains the model of that folder."""
    name = re.fullmatch(r"runs/(.+)/sft/model", folder)[1]
    return from_config_dict(TrainConfig, sft.get_config(f"student={name}").to_dict())


def interrupt(*_):
    raise KeyboardInterrupt


def fake_evaluate(folder, runs, *, dtype, mesh):
    """Writes results with the predictions of `ANSWERS` for the stage of `folder`."""
    assert (dtype, mesh.size) == (jnp.float32, 8)
    questions = [("what?", "red"), ("is it?", "yes"), ("is it not?", "no")]
    predictions = ANSWERS[folder.parent.name]
    rows = [
        {"id": str(i), "question": q, "images": [f"{i}.png"], "answers": [a], "prediction": p}
        for i, ((q, a), p) in enumerate(zip(questions, predictions, strict=True))
    ]
    scores = easy_vqa.score(rows)
    for run in runs:
        write_results(run.out, rows, scores)
    return [scores] * len(runs)


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """A recipe of two stages, the second of which also measures held-out records."""
    workdir, questions = map(tmp_path_factory.mktemp, ("recipe", "questions"))
    (questions / "test.json").write_text("[]")
    first = tiny_config("init", remat="none", steps=2)
    [source] = first.data.sources.values()
    second = dataclasses.replace(
        first,
        student=f"{workdir}/first/model",
        tokenizer="",
        heldout_steps=1,
        data=dataclasses.replace(first.data, heldout=source),
    )
    config = RecipeConfig(
        order=("first", "second"),
        stages={"first": first, "second": second},
        tasks={"vqa": TaskConfig("easy_vqa", str(questions))},
        evaluated=("first", "second"),
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recipe, "evaluate", fake_evaluate)
        recipe.run(config, workdir)
    return config, workdir


def test_the_table_has_the_scores_sizes_and_seconds_of_each_model(finished):
    workdir = finished[1]
    columns, rows = results_table(read_workdirs([workdir]))
    scores = ["Accuracy", "Yes/no", "Other", "False yes"]
    titles = [column.title for column in columns]
    assert titles == ["Model", *scores, "Parameters", "Activated", "Seconds"]
    assert [row["model"] for row in rows] == ["first", "second"]
    assert [row["vqa/accuracy"] for row in rows] == [2 / 3, 1.0]
    assert [row["vqa/accuracy_yes_no"] for row in rows] == [0.5, 1.0]
    assert [row["vqa/accuracy_other"] for row in rows] == [1.0, 1.0]
    assert [row["vqa/false_yes_rate"] for row in rows] == [1.0, 0.0]
    for row in rows:
        # The norm after the tower is stored and never computed: a scale and a bias.
        assert row["parameters"] == row["activated"] + 2 * 16
        last = [r for r in read_metrics(workdir / row["model"] / "metrics.jsonl") if "seconds" in r]
        assert row["seconds"] == last[-1]["seconds"]


def test_predictions_of_all_models_are_in_one_file(finished):
    lines = (finished[1] / "predictions" / "vqa.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "id": str(i),
            "question": question,
            "images": [f"{i}.png"],
            "answers": [answer],
            "predictions": {stage: ANSWERS[stage][i] for stage in ("first", "second")},
        }
        for i, (question, answer) in enumerate(
            [("what?", "red"), ("is it?", "yes"), ("is it not?", "no")]
        )
    ]


def test_the_report_has_the_stages_and_lists_images_that_are_missing(finished):
    page = (finished[1] / "report.html").read_text()
    assert "first → second" in page
    assert "<h2>vqa against first</h2>" in page
    assert "vqa: 3 images of examples cannot be read, as 0.png" in page


def test_more_steps_for_a_finished_stage_are_an_error(finished):
    """Its scores and the stages after it are those of the model that is there."""
    config, workdir = finished
    first = dataclasses.replace(config.stages["first"], steps=9)
    config = dataclasses.replace(config, stages=config.stages | {"first": first})
    message = r"^config\.stages\.first\.steps: expected 2, the steps of .*/first, or .*, got 9"
    with pytest.raises(ValueError, match=message):
        recipe.run(config, workdir)


def test_a_finished_recipe_neither_trains_nor_evaluates_again(finished, monkeypatch):
    config, workdir = finished
    table = format_table(*results_table(read_workdirs([workdir])))
    monkeypatch.setattr(loop, "prepare", None)
    monkeypatch.setattr(recipe, "evaluate", None)
    assert recipe.run(config, workdir) == table


def test_one_recipe_at_a_time_runs_in_a_workdir(finished):
    config, workdir = finished
    message = "a folder without a run in progress"
    with locked(workdir), pytest.raises(ValueError, match=message):
        recipe.run(config, workdir)


def test_a_task_of_lmms_eval_is_asked_of_every_model_and_in_the_table(
    finished, tmp_path, monkeypatch
):
    """Those that have its scores are not asked again; lmms-eval is replaced by what it writes."""
    config, before = finished
    workdir = shutil.copytree(before, tmp_path / "recipe")
    asked = []

    def fake(model, tasks, out, arguments, limit):
        asked.append((Path(model).parent.name, tasks, arguments["dtype"], limit))
        sample = {"id": "0", "question": "q", "images": [], "answers": ["a"], "prediction": "b"}
        (out / "samples").mkdir(parents=True)
        write_jsonl(out / "samples" / "pope.jsonl", [sample | {"metrics": {"f1": 0.5}}])
        scores = {"pope": {"f1": 0.5, "f1_stderr": 0.1}}
        write_json(out / "scores.json", scores)
        return scores

    monkeypatch.setattr(recipe, "check_tasks", lambda tasks, origin: None)
    monkeypatch.setattr(recipe, "evaluate_tasks", fake)
    tasks = {**config.tasks, "hallucination": TaskConfig("pope", limit=7)}
    config = dataclasses.replace(config, tasks=tasks)
    for _ in range(2):
        recipe.run(config, workdir)
    assert asked == [(stage, ["pope"], "float32", 7) for stage in ("first", "second")]
    columns, rows = results_table(read_workdirs([workdir]))
    assert "pope: f1" in [column.title for column in columns]
    assert [row["pope/f1"] for row in rows] == [0.5, 0.5]
    assert [row["model"] for row in rows] == ["first", "second"]


def test_a_task_that_lmms_eval_does_not_have_is_an_error_before_the_first_stage(
    finished, tmp_path, monkeypatch
):
    def check(tasks, origin):
        raise UserError(f"{origin}: expected a task of lmms-eval, got {tasks[0]!r}")

    monkeypatch.setattr(recipe, "check_tasks", check)
    config = dataclasses.replace(finished[0], tasks={"x": TaskConfig("popes")})
    with pytest.raises(UserError, match=r"^config\.tasks\.x\.task: expected a task of lmms-eval"):
        recipe.run(config, tmp_path)
    assert not list(tmp_path.iterdir())
