"""What reports read in folders, and what they say of damage; the command over them."""

import json
import math
import os
import re

import pytest

from moddistill import report
from moddistill.errors import UserError
from moddistill.evals.results import write_jsonl
from moddistill.reports.results_table import results_table
from moddistill.reports.table import format_table
from moddistill.reports.workdirs import read_workdirs

LOAD = {"layer": 0, "image": [1.0], "text": [1.0]}
ROW = {"step": 10, "loss": 1.0, "seconds": 2.0}


def run(folder, teacher="", rows=(ROW,), began=0):
    """A training run that began after so many seconds."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"teacher": teacher}))
    os.utime(folder / "config.json", (began, began))
    return folder


def evaluation(folder, correct, task=None):
    """Results of a task of this library, a question for each letter of `correct`."""
    folder.mkdir(parents=True)
    rows = [
        {
            "id": str(i),
            "question": "q\u2028",
            "answers": ["yes"],
            "prediction": "?",
            "correct": c == "y",
        }
        for i, c in enumerate(correct)
    ]
    write_jsonl(folder / "predictions.jsonl", rows)
    (folder / "scores.json").write_text(json.dumps({"accuracy": 0.5, "expert_load": []}))
    if task:
        (folder / "evaluation.json").write_text(json.dumps({"task": task}))
    return folder


@pytest.fixture
def workdir(tmp_path):
    """A recipe without a record of its order: a student taught by a run before it."""
    run(tmp_path / "demo" / "z_teacher", began=100)
    run(tmp_path / "demo" / "a_student", teacher="runs/demo/z_teacher/model", began=200)
    evaluation(tmp_path / "demo" / "z_teacher" / "evals" / "vqa", "yyyn")
    evaluation(tmp_path / "demo" / "a_student" / "evals" / "vqa", "yynn")
    return tmp_path / "demo"


def test_runs_and_results_are_in_the_order_in_which_they_began(workdir):
    content = read_workdirs([workdir])
    assert [each.name for each in content.runs] == ["z_teacher", "a_student"]
    assert [(each.model, each.task) for each in content.results] == [
        ("z_teacher", "vqa"),
        ("a_student", "vqa"),
    ]
    assert content.problems == []


def test_the_record_of_a_recipe_gives_the_order(workdir):
    record = {"order": ["a_student", "z_teacher"], "tasks": {"vqa": "easy_vqa"}}
    (workdir / "recipe.json").write_text(json.dumps(record))
    content = read_workdirs([workdir])
    assert [each.name for each in content.runs] == ["a_student", "z_teacher"]
    assert content.results[0].definition is not None


def test_names_of_several_folders_begin_with_theirs(workdir, tmp_path):
    other = evaluation(tmp_path / "published", "nnnn", task="vqa")
    content = read_workdirs([workdir, other])
    assert content.models == ["demo/z_teacher", "demo/a_student", "published"]
    assert list(content.tasks) == ["vqa"]


def test_results_of_lmms_eval_have_a_task_each(tmp_path):
    folder = tmp_path / "results"
    (folder / "samples").mkdir(parents=True)
    scores = {"exact_match": 0.5, "exact_match_stderr": 0.1, "expert_load": [LOAD]}
    (folder / "scores.json").write_text(json.dumps({"gqa": scores, "pope": {"f1": 0.25}}))
    row = {"id": "0", "prediction": "a", "metrics": {"exact_match": 1.0}}
    (folder / "samples" / "gqa.jsonl").write_text(json.dumps(row) + "\n")
    content = read_workdirs([folder])
    gqa, pope = content.results
    assert (gqa.scores, gqa.loads) == ({"exact_match": 0.5}, [LOAD])
    assert gqa.score(gqa.rows[0]) == 1.0 and pope.rows == []
    [problem] = content.problems
    assert problem.endswith("pope.jsonl: expected questions with their answers, got none")
    table = format_table(*results_table(content)).splitlines()
    assert [cell.strip() for cell in table[2].split("|")[1:4]] == ["results", "0.5", "0.25"]


@pytest.mark.parametrize(
    "loads",
    [
        None,
        3,
        [None],
        [{"layer": 0, "image": [1, 2], "text": [1]}],
        [{"layer": 0, "image": [1, "2"], "text": [1, 2]}],
        [{"layer": 0, "image": [1, -2], "text": [1, 2]}],
        [{"layer": 0, "image": [0, 0], "text": [0, 0]}],
        [{"layer": 0, "image": [1, 2]}],
        [{"image": [1, 2], "text": [1, 2]}],
        [{"layer": 0, "image": [1, 2], "text": [1, "2"]}],
        [{"layer": 0, "image": [1, 2], "text": 2}],
        [{"layer": 0, "image": [1, 2], "text": [1, math.inf]}],
        [LOAD, {"layer": 1, "image": [1, 2]}],
    ],
)
def test_loads_that_are_no_shares_are_listed_and_the_rest_is_read(tmp_path, loads):
    folder = tmp_path / "results"
    folder.mkdir()
    scores = {"accuracy": 0.5, "expert_load": loads}
    (folder / "scores.json").write_text(json.dumps({"gqa": scores}))
    content = read_workdirs([folder])
    [found] = content.results
    assert (found.scores, found.loads) == ({"accuracy": 0.5}, [])
    assert content.problems[-1].startswith("results, gqa: expert_load: expected for each layer a ")


def test_a_group_of_tasks_has_no_results_of_its_own(tmp_path):
    """lmms-eval lists `mmbench_en` next to the tasks in it, which have the scores."""
    (tmp_path / "scores.json").write_text(json.dumps({"group": {}, "inside": {"f1": 0.5}}))
    content = read_workdirs([tmp_path])
    assert [each.task for each in content.results] == ["inside"]
    assert not any("group.jsonl" in problem for problem in content.problems)


def test_a_cut_line_is_counted(workdir):
    file = workdir / "a_student" / "evals" / "vqa" / "predictions.jsonl"
    file.write_text(file.read_text()[:-9])
    content = read_workdirs([workdir])
    assert len(content.results[1].rows) == 3
    expected = f"{file}: left out 1 line that is no question with its answer, of 4"
    assert content.problems == [expected]


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"answers": None},
        {"correct": "yes"},
        {"correct": True, "metrics": 1},
        {"correct": True, "images": None},
        {"correct": True, "images": [3]},
    ],
)
def test_a_row_that_cannot_be_scored_is_counted(damage, tmp_path):
    folder = evaluation(tmp_path / "published", "yn", task="easy_vqa")
    file = folder / "predictions.jsonl"
    file.write_text(file.read_text() + json.dumps({"id": "2", "prediction": "?", **damage}) + "\n")
    content = read_workdirs([folder])
    [found] = content.results
    assert [found.score(row) for row in found.rows] == [1.0, 0.0]
    expected = f"{file}: left out 1 line that is no question with its answer, of 3"
    assert content.problems == [expected]


def test_damage_is_worded_and_the_rest_is_read(workdir):
    (workdir / "a_student" / "metrics.jsonl").write_text("")
    (workdir / "a_student" / "evals" / "vqa" / "scores.json").write_text('{"accuracy": 0.')
    (workdir / "z_teacher" / "model").mkdir()
    content = read_workdirs([workdir, workdir.parent / "nothing"])
    assert [each.name for each in content.runs] == ["demo/z_teacher"]
    assert len(content.results) == 1
    model, metrics, scores, missing = content.problems
    assert "without model.json" in model
    assert metrics.endswith("metrics.jsonl: expected rows of training steps, got none")
    assert re.search(r"scores\.json: expected JSON, got invalid text", scores)
    assert missing.endswith("nothing: expected a folder, got none")


def test_a_folder_that_is_no_workdir_is_an_error(tmp_path):
    message = r"expected a workdir or a folder of results, got neither metrics\.jsonl nor scores"
    with pytest.raises(UserError, match=message):
        read_workdirs([tmp_path])


def test_the_command_writes_a_page_and_lists_problems(workdir, tmp_path, capsys):
    page = tmp_path / "page.html"
    report.main([str(workdir), str(tmp_path / "none"), "--out", str(page)])
    printed = capsys.readouterr()
    assert printed.out == f"{page}: 2 runs, 2 results, 1 problems\n"
    assert printed.err == f"not read: {tmp_path}/none: expected a folder, got none\n"
    text = page.read_text()
    assert "vqa against demo/z_teacher" in text and "<title>demo, none</title>" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "missing/page.html"], "^error: --out: expected a file in an existing folder"),
        (["--teacher", "teacher"], "^error: --teacher: expected one of 'z_teacher', 'a_student'"),
    ],
)
def test_wrong_flags_are_an_error(workdir, flags, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        report.main([str(workdir), *flags])
