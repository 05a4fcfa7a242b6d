"""A suite's comparison from finished folders of results, and its command."""

import json
import re

import numpy as np
import pytest

from moddistill import evaluate
from moddistill.errors import UserError
from moddistill.evals import suite as suites
from moddistill.evals.labels import labels
from moddistill.evals.question_scores import FORMS
from tests.reports.test_report import Balance

NAMES = ["llava-mod"]


def results(folder, tasks):
    """Writes a folder of results: `{task: (metric, score, values of the questions)}`."""
    (folder / "samples").mkdir(parents=True)
    scores = {task: {metric: score} for task, (metric, score, _) in tasks.items()}
    (folder / "scores.json").write_text(json.dumps(scores))
    for task, (metric, _, values) in tasks.items():
        rows = [
            {"id": str(number), "prediction": "a", "metrics": {metric: value}}
            for number, value in enumerate(values)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "samples" / f"{task}.jsonl").write_text(text)
    return folder


def choices(share):
    """Values of MMBench, of which that share is right; 100 questions."""
    return [
        {"index": number, "answer": "A", "prediction": "A" if number < 100 * share else "B"}
        for number in range(100)
    ]


def whole(folder, share):
    """Results on the benchmarks of the average, all with one score in percent."""
    right = [float(number < 100 * share) for number in range(100)]
    images = [
        {"question_id": f"{number // 2}", "category": "color", "score": float(number < 100 * share)}
        for number in range(100)
    ]
    matched = ("gqa", "vizwiz_vqa_val", "scienceqa_img", "textvqa_val_llava_mod")
    tasks = dict.fromkeys(matched, ("exact_match", share, right))
    tasks["mme"] = ("mme_perception_score", 200 * share, images)
    for language in ("en", "cn"):
        task = f"mmbench_{language}_dev_llava_mod"
        tasks[task] = ("gpt_eval_score", 100 * share, choices(share))
    return results(folder, tasks)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two models, the second of which lacks a task, and has others that are damaged."""
    folder = tmp_path_factory.mktemp("results")
    first, second = whole(folder / "first", 0.5), whole(folder / "second", 0.8)
    scores = json.loads((second / "scores.json").read_text())
    del scores["textvqa_val_llava_mod"]
    scores["scienceqa_img"]["exact_match"] = 0.7  # not what the questions give
    (second / "scores.json").write_text(json.dumps(scores))
    file = second / "samples" / "vizwiz_vqa_val.jsonl"
    file.write_text(file.read_text()[:-5])
    suite = suites.read_suite("llava-mod")
    failures = {"second": {"textvqa_val_llava_mod": "its data set is missing"}}
    return suites.compare(suite, {"first": first, "second": second}, failures)


def row_of(comparison, name):
    [row] = [row for row in comparison["rows"] if row["name"] == name]
    return row


def test_scores_have_intervals_and_paired_differences(comparison):
    cells = row_of(comparison, "GQA")["scores"]
    assert cells["first"]["score"] == 50 and cells["second"]["score"] == pytest.approx(80)
    error = 1.96 * np.sqrt(0.5 * 0.5 / 100) * 100
    assert cells["first"]["low"] == pytest.approx(50 - error, abs=1.5)
    # Of 100 questions, the second model has 30 more: the difference varies as a share of 0.3.
    difference, error = cells["second"]["difference"], 1.96 * np.sqrt(0.3 * 0.7 / 100) * 100
    assert difference["score"] == pytest.approx(30)
    assert difference["high"] == pytest.approx(30 + error, abs=1.5)
    assert "difference" not in cells["first"]


def test_scores_are_scaled_as_the_paper_has_them(comparison):
    assert row_of(comparison, "MME")["scores"]["first"]["score"] == 5  # 200 x 0.5 / 20
    assert row_of(comparison, "MMB")["scores"]["second"]["score"] == pytest.approx(80)


def test_a_row_without_a_score_says_why(comparison):
    cells = row_of(comparison, "TextVQA")["scores"]
    assert cells["second"] == {"note": "its data set is missing"}
    assert row_of(comparison, "POPE")["scores"]["first"] == {"note": "no scores of the task 'pope'"}


def test_an_interval_is_given_only_if_the_questions_give_the_score(comparison):
    cell = row_of(comparison, "SQA-I")["scores"]["second"]
    assert cell["score"] == 70 and "low" not in cell
    assert cell["note"] == "no interval: the questions give 80.00"
    cell = row_of(comparison, "VizWiz")["scores"]["second"]
    assert cell["note"] == "no interval: the questions give 80.81; 1 lines are damaged"


@pytest.mark.parametrize(
    ("scores", "note"),
    [
        ({"gqa": 3.0}, "scores.json, gqa: expected scores by name, got 3.0"),
        ({"gqa": {"exact_match": None}}, "scores.json, gqa, exact_match: expected a number, got"),
        ({"gqa": {"exact_match": "1"}}, "scores.json, gqa, exact_match: expected a number, got"),
        ({"gqa": {"exact_match": np.nan}}, "scores.json, gqa, exact_match: expected a number, got"),
    ],
)
def test_a_damaged_score_is_a_note(scores, note, tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    found = suites.compare(suites.read_suite("llava-mod"), {"a": tmp_path}, {})
    [name] = row_of(found, "GQA")["scores"]["a"]
    assert name == "note" and row_of(found, "GQA")["scores"]["a"]["note"].startswith(note)


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        ({"metrics": {"exact_match": 0.0}}, "the questions give 100.00; 1 lines are damaged"),
        ({"id": "3", "metrics": None}, "the questions give 100.00; 1 lines are damaged"),
        ({"id": "3", "metrics": {"exact_match": None}}, "the questions have no scores"),
        ({"id": "3", "metrics": {"exact_match": [1.0]}}, "the questions have no scores"),
    ],
)
def test_a_damaged_question_is_a_note(damage, note, tmp_path):
    folder = results(tmp_path / "a", {"gqa": ("exact_match", 0.5, [1.0])})
    with (folder / "samples" / "gqa.jsonl").open("a") as file:
        file.write(json.dumps(damage) + "\n")
    found = suites.compare(suites.read_suite("llava-mod"), {"a": folder}, {})
    assert row_of(found, "GQA")["scores"]["a"]["note"] == f"no interval: {note}"


@pytest.mark.parametrize("content", ["[{", "3", "{}"])
def test_damaged_verdicts_are_a_note(content, tmp_path):
    score = {"mmhal_bench": {"mmhal_hallucination_rate": 50}}
    (tmp_path / "scores.json").write_text(json.dumps(score))
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions" / "mmhal_bench_answers.json").write_text(content)
    found = suites.compare(suites.read_suite("llava-mod"), {"a": tmp_path}, {})
    cell = row_of(found, "MMHal")["scores"]["a"]
    assert cell["score"] == 50
    expected = r"^no interval: submissions/mmhal_bench_answers\.json: expected (JSON|a list of que)"
    assert re.match(expected, cell["note"])


def test_the_average_needs_all_its_benchmarks(comparison):
    cells = row_of(comparison, "average")["scores"]
    assert cells["first"]["score"] == pytest.approx((6 * 50 + 5) / 7)
    # Seven independent benchmarks: their mean varies less than each.
    gqa = row_of(comparison, "GQA")["scores"]["first"]
    narrower = (cells["first"]["high"] - cells["first"]["low"]) / (gqa["high"] - gqa["low"])
    assert narrower == pytest.approx(np.sqrt(6) / 7, rel=0.1)
    assert cells["second"] == {"note": "no average without TextVQA"}


def test_published_scores_are_marked_if_no_source_confirms_them(comparison):
    published = row_of(comparison, "VizWiz")["published"]
    assert published["LLaVA-MoD-2B"] == {"score": 39.2, "confirmed": True}
    assert published["LLaVA-MoD-1B"] == {"score": 31.6, "confirmed": False}


@pytest.mark.parametrize("name", NAMES)
def test_the_data_of_a_suite_are_consistent(name):
    suite = suites.read_suite(name)
    names = [each.name for each in suite.benchmarks]
    assert len(set(names)) == len(names) and set(suite.average) <= set(names)
    assert {each.units for each in suite.benchmarks} <= set(FORMS)
    for each in suite.published:
        assert set(each["unconfirmed"]) <= set(each["scores"]) <= {*names, "average"}
        if set(suite.average) <= set(each["scores"]):
            mean = np.mean([each["scores"][benchmark] for benchmark in suite.average])
            assert mean == pytest.approx(each["scores"]["average"], abs=0.1)


def test_an_unknown_suite_is_an_error():
    with pytest.raises(UserError, match=r"^--suite: expected one of 'llava-mod', got 'llavamod'"):
        suites.read_suite("llavamod")


def test_models_are_evaluated_unless_they_have_results(tmp_path, monkeypatch):
    finished = whole(tmp_path / "results" / "a", 0.5)
    calls = []

    def run_tasks(model, tasks, out, arguments, include):
        calls.append((model, out, arguments, include))
        return {"gqa": "reason"}

    monkeypatch.setattr(suites, "run_tasks", run_tasks)
    suite = suites.read_suite("llava-mod")
    models = [str(finished), "runs/d2s/model"]
    folders, failures = suites.evaluate_models(suite, models, tmp_path, {"dtype": "x"}, "own")
    assert folders == {"a": finished, "d2s": tmp_path / "d2s"}
    assert calls == [("runs/d2s/model", tmp_path / "d2s", {"dtype": "x"}, "own")]
    assert failures == {"a": {}, "d2s": {"gqa": "reason"}}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/demo/d2s/model", "runs/demo/d2d/model"], ["d2s", "d2d"]),
        (["a/d2s/model", "b/d2s/model"], ["a-d2s", "b-d2s"]),
        (["llava-hf/llava-interleave-qwen-7b-hf"], ["llava-interleave-qwen-7b-hf"]),
        (["model", "x/model"], ["model", "x"]),
    ],
)
def test_labels_are_the_shortest_names_that_differ(paths, names):
    assert labels(paths, "--compare") == names


def test_labels_are_not_dots(tmp_path, monkeypatch):
    (tmp_path / "student" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "student" / "inner")
    assert labels(["..", "."], "--compare") == ["student", "inner"]


def test_one_model_twice_is_an_error():
    with pytest.raises(UserError, match=r"^--compare: expected different models or folders, got"):
        labels(["a/model", "a/model"], "--compare")


def test_the_command_prints_a_table_and_writes_json_and_a_page(tmp_path, capsys):
    folders = [str(whole(tmp_path / name, share)) for name, share in (("a", 0.5), ("b", 0.6))]
    out = tmp_path / "out"
    evaluate.main(["--suite", "llava-mod", "--compare", *folders, "--out", str(out)])
    printed = capsys.readouterr().out
    assert re.search(r"\| GQA +\| +50\.0 \[\d+\.\d, \d+\.\d\] \| +60\.0 \[.*\| +56\.2 \|", printed)
    assert "POPE, a, b: no scores of the task 'pope'" in printed
    stored = json.loads((out / "comparison.json").read_text())
    assert stored["bootstrap"] == {"resamples": 2000, "confidence": 0.95, "seed": 0}
    assert row_of(stored, "GQA")["scores"]["b"]["difference"]["score"] == pytest.approx(10)
    page = (out / "comparison.html").read_text()
    parsed = Balance(page)
    assert "script" not in parsed.tags and "http" not in page
    assert "56.6*" in page and "b - a" in page
    evaluate.main(["--suite", "llava-mod", "--compare", *folders, "--out", str(tmp_path / "again")])
    assert json.loads((tmp_path / "again" / "comparison.json").read_text()) == stored


def test_a_suite_without_any_score_fails_after_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suites, "run_tasks", lambda model, tasks, *_: dict.fromkeys(tasks, "why"))
    flags = ["--suite", "llava-mod", "--compare", "a", "b", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"^error: --compare: expected a model with a score, got"):
        evaluate.main(flags)
    assert "GQA, a, b: why" in capsys.readouterr().out
    assert (tmp_path / "comparison.json").is_file() and (tmp_path / "comparison.html").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "llava-mod"], "--compare: expected with --suite, and only there"),
        (["--tasks", "mme"], "--model: expected with --task and --tasks, and only there"),
        (
            ["--suite", "llava-mod", "--compare", "a", "--model", "b"],
            "--model: expected with --task and --tasks, and only there",
        ),
    ],
)
def test_flags_that_do_not_fit_are_an_error(flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([*flags, "--out", "o"])
    assert message in capsys.readouterr().err
