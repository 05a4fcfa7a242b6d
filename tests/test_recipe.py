import dataclasses
import json
import re

import pytest

from experiments import llava_mod, sft
from moddistill import recipe
from moddistill.config import RecipeConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.training import loop
from moddistill.training.metrics import read_metrics

ANSWERS = {
    "first": ["red", "yes", "yes"],
    "second": ["red", "yes", "no"],
}


def test_workdir_is_put_into_every_text():
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
        ({"order": ("a",)}, r"config\.order is \('a',\); accepted: each of \('a', 'b'\) once"),
        ({"order": ("a", "a", "b")}, r"config\.order is"),
        ({"order": ("a", "c")}, r"config\.order is"),
        ({"evaluated": ("a", "c")}, r"config\.evaluated names \['c'\]; accepted: stages, a, b"),
        (
            {"evaluated": ("a",)},
            r"evaluated is \('a',\), but config\.benchmark is empty",
        ),
        (
            {"evaluated": ("a",), "benchmark": "easy_vqa", "benchmark_data": "no/such"},
            r"no/such/test\.json does not exist",
        ),
    ],
)
def test_order_and_stages_must_fit(tmp_path, fields, message):
    stages = {"a": TrainConfig(), "b": TrainConfig()}
    config = RecipeConfig(**{"order": ("a", "b"), "stages": stages} | fields)
    with pytest.raises(ValueError, match=message):
        recipe.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["sources", "heldout"])
def test_records_and_pictures_of_every_stage_are_looked_for_first(tiny_config, tmp_path, part):
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

    where = rf"^stage 'second': config\.data\.{'sources.a' if part == 'sources' else 'heldout'}: "
    with pytest.raises(
        ValueError, match=where + r"data file 'gone\.json' does not exist; expected"
    ):
        run(path="gone.json")
    with pytest.raises(
        ValueError, match=where + r"image folder of .* record 1 has an image, got 'gone'"
    ):
        run(images="gone")
    assert not workdir.exists()
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recipe, "train", interrupt)
        run(path=f"{workdir}/first/made.json")


@pytest.mark.parametrize("where", ["folder", "earlier stage"])
def test_the_template_of_a_teacher_is_compared_before_the_first_stage(
    where, tiny_config, tiny_models, tmp_path
):
    workdir = tmp_path / "run"
    teacher = {"folder": tiny_models["teacher"], "earlier stage": workdir / "first" / "model"}
    data = dataclasses.replace(tiny_config("d2d").data, template="chatml")
    first = tiny_config("sft")
    second = tiny_config("d2d", teacher=str(teacher[where]), data=data)
    stages = {"first": first, "second": second}
    message = (
        r"^stage 'second': config\.data\.template is 'chatml', but .*; accepted: 'vicuna', or the"
    )
    with pytest.raises(ValueError, match=message):
        recipe.run(RecipeConfig(order=tuple(stages), stages=stages), workdir)
    assert not workdir.exists()


def test_templates_of_the_experiments_fit_each_other():
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


def fake_evaluate(folder, name, data, out):
    """Writes what the benchmark would, with an answer wrong or right as `ANSWERS` has it."""
    questions = [("what?", "red"), ("is it?", "yes"), ("is it not?", "no")]
    rows = [
        {"question": q, "image": f"{i}.png", "answer": a, "prediction": p}
        for i, ((q, a), p) in enumerate(zip(questions, ANSWERS[out.name], strict=True))
    ]
    (out / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right = [row["answer"] == row["prediction"] for row in rows]
    scores = {
        "accuracy": sum(right) / 3,
        "accuracy_yes_no": sum(right[1:]) / 2,
        "accuracy_other": float(right[0]),
        "false_yes_rate": float(not right[2]),
    }
    (out / "scores.json").write_text(json.dumps(scores))
    return scores


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
        benchmark="easy_vqa",
        benchmark_data=str(questions),
        evaluated=("first", "second"),
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recipe, "evaluate", fake_evaluate)
        # Pictures are not there; the report has its own tests.
        patched.setattr(recipe, "_examples", lambda *_: [])
        rows = recipe.run(config, workdir)
    return config, workdir, rows


def test_table(finished):
    config, workdir, rows = finished
    assert rows == recipe.table(config, workdir)
    assert [row["model"] for row in rows] == ["first", "second"]
    assert [row["accuracy"] for row in rows] == [2 / 3, 1.0]
    assert [row["yes_no"] for row in rows] == [0.5, 1.0]
    assert [row["other"] for row in rows] == [1.0, 1.0]
    assert [row["false_yes"] for row in rows] == [1.0, 0.0]
    for row in rows:
        # The norm behind the tower is stored and never computed: a scale and a bias.
        assert row["parameters"] == row["activated"] + 2 * 16
        last = [r for r in read_metrics(workdir / row["model"] / "metrics.jsonl") if "seconds" in r]
        assert row["seconds"] == last[-1]["seconds"]


def test_predictions_stand_side_by_side(finished):
    lines = (finished[1] / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "question": question,
            "image": f"{i}.png",
            "answer": answer,
            "first": ANSWERS["first"][i],
            "second": ANSWERS["second"][i],
        }
        for i, (question, answer) in enumerate(
            [("what?", "red"), ("is it?", "yes"), ("is it not?", "no")]
        )
    ]


def test_report_is_written(finished):
    page = (finished[1] / "report.html").read_text()
    assert "first → second" in page


def test_a_finished_stage_does_not_go_on(finished):
    """Its scores and the stages after it are those of the model that is there."""
    config, workdir, _ = finished
    first = dataclasses.replace(config.stages["first"], steps=9)
    config = dataclasses.replace(config, stages=config.stages | {"first": first})
    message = r"^stage 'first': config\.steps is 9, but .*/first is finished with 2; accepted: 2"
    with pytest.raises(ValueError, match=message):
        recipe.run(config, workdir)


def test_finished_recipe_trains_and_asks_nothing_again(finished, monkeypatch):
    config, workdir, rows = finished
    monkeypatch.setattr(loop, "prepare", None)
    monkeypatch.setattr(recipe, "evaluate", None)
    monkeypatch.setattr(recipe, "_examples", lambda *_: [])
    assert recipe.run(config, workdir) == rows
