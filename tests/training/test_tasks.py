"""Tasks during training: when they run, of which questions, and where their results are."""

import dataclasses
import json
import os
import signal

import pytest

from moddistill.config import TaskConfig
from moddistill.errors import StoppedError
from moddistill.evals.runner import TaskRun, evaluate, find_task
from moddistill.training import loop, tasks
from moddistill.training.metrics import read_metrics
from moddistill.training.tasks import Tasks

COUNTING = "tests.evals.counting"


@pytest.fixture(scope="module")
def questions(tmp_path_factory, image):
    """Three questions with 0 to 2 images, whose answers a model of random weights may give."""
    folder = tmp_path_factory.mktemp("questions")
    images = [str(image(seed)) for seed in range(2)]
    rows = [
        {"id": str(n), "prompt": " ".join(["<image>"] * n) + " what?", "images": images[:n],
         "answers": ["a"]}
        for n in range(3)
    ]  # fmt: skip
    (folder / "questions.json").write_text(json.dumps(rows))
    return folder


def scores_by_step(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return {
        row["step"]: {name: x for name, x in row.items() if name.startswith("eval_")}
        for row in rows
        if any(name.startswith("eval_") for name in row)
    }


def config_of(tiny_config, questions, stage="sft", **changes):
    config = tiny_config(stage, steps=3, **changes)
    named = {
        "all": TaskConfig(COUNTING, str(questions)),
        "two": TaskConfig(COUNTING, str(questions), 2),
    }
    return dataclasses.replace(config, tasks=named, eval_every=2)


@pytest.fixture(scope="module", params=["sft", "d2s"])
def trained(request, tiny_config, questions, tmp_path_factory):
    workdir = tmp_path_factory.mktemp(request.param)
    return loop.train(config_of(tiny_config, questions, request.param), workdir), workdir


def test_tasks_run_every_second_step_and_after_the_last(trained):
    expected = {"eval_all_exact", "eval_all_images", "eval_all_hidden", "eval_two_exact"}
    found = scores_by_step(trained[1])
    assert list(found) == [2, 3]
    assert all(scores.keys() >= expected for scores in found.values())
    # `counting` scores the number of images: 0 + 1 + 2, and 0 + 1 of the first two questions.
    assert all((x["eval_all_images"], x["eval_two_images"]) == (3, 1) for x in found.values())


@pytest.mark.slow
def test_answers_are_those_of_the_model_that_the_stage_writes(trained, questions, tmp_path):
    folder, workdir = trained
    config = json.loads((workdir / "config.json").read_text())
    run = TaskRun(find_task(COUNTING), questions, tmp_path)
    evaluate(folder, [run], dtype=config["dtype"])
    during = workdir / "evaluations" / "3" / "all" / "predictions.jsonl"
    assert during.read_text() == (tmp_path / "predictions.jsonl").read_text()


@pytest.mark.slow
def test_a_signal_ends_the_answers_which_the_resumed_run_makes_up_for(
    tiny_config, questions, tmp_path, monkeypatch
):
    config = config_of(tiny_config, questions)
    loop.train(config, tmp_path / "whole")
    answer_and_score, asked = tasks.answer_and_score, []

    def interrupted(*args):
        *args, on_answer = args

        def stopped():
            asked.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
            while not asked[1:] and not on_answer.__self__.number:
                pass  # the signal reaches its thread
            on_answer()

        return answer_and_score(*args, stopped)

    with monkeypatch.context() as patched, pytest.raises(StoppedError, match="after step 2"):
        patched.setattr(tasks, "answer_and_score", interrupted)
        loop.train(config, tmp_path / "run")
    assert len(asked) == 1  # of three questions
    loop.train(config, tmp_path / "run")
    assert scores_by_step(tmp_path / "run") == scores_by_step(tmp_path / "whole")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskConfig("easy_vqa", "no/such"), r"^config\.tasks\.x\.data: no/such/test\.json: expec"),
        (TaskConfig("countng", "data"), r"^config\.tasks\.x\.task: expected 'easy_vqa' or"),
        (TaskConfig(COUNTING, "data", -1), r"^config\.tasks\.x\.limit: expected >= 0, got -1"),
    ],
)
def test_tasks_that_cannot_be_asked_are_an_error_before_the_first_step(
    tiny_config, tmp_path, task, message
):
    config = dataclasses.replace(tiny_config("sft"), tasks={"x": task})
    with pytest.raises(ValueError, match=message):
        loop.train(config, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_steps_between_evaluations_of_nothing_are_an_error(tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"config\.eval_every: expected 0, since config\.tasks is"):
        loop.train(tiny_config("sft", eval_every=2), tmp_path)


def test_no_task_is_due_between_its_steps(tiny_config, questions, tmp_path):
    config = config_of(tiny_config, questions)
    made = Tasks.__new__(Tasks)
    made._config = config
    assert [step for step in range(1, 4) if made.is_due(step)] == [2, 3]
