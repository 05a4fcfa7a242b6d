"""Summary of a recipe with several tasks, from the files of its stages."""

import json
import re
import shutil

import pytest
from PIL import Image

from moddistill.config import RecipeConfig, TaskConfig
from moddistill.evals.results import write_results
from moddistill.reports import summary
from tests.evals import counting

LOADS = [{"layer": 1, "image": [1, 3], "text": [2, 2]}]


@pytest.fixture(scope="module")
def finished(tiny_models, tmp_path_factory):
    """Two finished stages with results of two tasks, whose questions have 0, 1 and 2 images.

    Returns the table of scores and the workdir.
    """
    workdir = tmp_path_factory.mktemp("run")
    Image.new("RGB", (8, 8)).save(workdir / "a.png")
    config = RecipeConfig(
        order=("teacher", "student"),
        tasks={
            "val": TaskConfig("tests.evals.counting", "unused"),
            "test": TaskConfig("tests.evals.counting", "unused"),
        },
        evaluated=("teacher", "student"),
    )
    for stage, model, prediction in (("teacher", "teacher", "Yes"), ("student", "sparse", "no")):
        shutil.copytree(tiny_models[model], workdir / stage / "model")
        row = {"step": 1, "loss": 1.0, "seconds": 2.0}
        (workdir / stage / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        for task, answer in (("val", "yes"), ("test", "no")):
            rows = [
                {
                    "id": f"{task}-{i}",
                    "question": f"{task} question {i}?",
                    "images": [str(workdir / "a.png")] * i,
                    "answers": [answer],
                    "prediction": prediction,
                }
                for i in range(3)
            ]
            scores = counting.score(rows) | ({"expert_load": LOADS} if model == "sparse" else {})
            write_results(summary.evaluation_folder(workdir, stage, task), rows, scores)
    summary.write_recipe(config, workdir)
    return summary.write_summary(workdir), workdir


def test_the_table_has_the_columns_of_each_task_in_the_tasks_own_format(finished):
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in finished[0].splitlines()
    ]
    assert cells[0] == [
        "Model", "val: Exact", "val: Images", "test: Exact", "test: Images", "Parameters",
        "Activated", "Seconds",
    ]  # fmt: skip
    assert cells[2][:5] == ["teacher", "100.0%", "3", "0.0%", "3"]
    assert cells[3][:5] == ["student", "0.0%", "3", "100.0%", "3"]


def test_each_task_has_a_file_of_predictions(finished):
    for task, answer in (("val", "yes"), ("test", "no")):
        lines = (finished[1] / "predictions" / f"{task}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["id"] for row in rows] == [f"{task}-{i}" for i in range(3)]
        for row in rows:
            assert row["answers"] == [answer]
            assert row["predictions"] == {"teacher": "Yes", "student": "no"}


def test_the_page_has_examples_and_loads_of_each_task(finished):
    page = (finished[1] / "report.html").read_text()
    assert "<h1>" in page and "teacher → student</h1>" in page
    assert re.findall(r"<h2>(.*): (.*)</h2>", page) == [
        ("Answers", "val"), ("Answers", "test"), ("Expert load", "val"), ("Expert load", "test")
    ]  # fmt: skip
    assert page.count("<img ") == 2 * (0 + 1 + 2)
    marks = re.findall(r'aria-label="(right|wrong)"', page)
    assert marks == ["right", "wrong"] * 3 + ["wrong", "right"] * 3
    assert page.count("Shares of exact answers &amp; the number of images.") == 1


def test_a_recipe_without_evaluation_has_a_page_of_its_training(finished, tmp_path):
    shutil.copytree(finished[1] / "teacher", tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher" / "evals")
    summary.write_recipe(RecipeConfig(order=("teacher",)), tmp_path)
    assert summary.write_summary(tmp_path) == ""
    page = (tmp_path / "report.html").read_text()
    assert "<h3>teacher</h3>" in page
    assert re.findall(r"<th>(.*?)</th>", page) == ["Model", "Parameters", "Activated", "Seconds"]
    assert not (tmp_path / "predictions").exists()
