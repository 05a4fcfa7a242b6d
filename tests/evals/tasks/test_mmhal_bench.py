"""MMHal-Bench: the publisher's files, verdicts, and answers without one."""

import argparse
import json
import re

import pytest

from moddistill.evals.tasks._task_utils.errors import TaskError
from moddistill.evals.tasks._task_utils.judge import verdicts_once
from moddistill.evals.tasks.mmhal_bench import utils

RATINGS = {"Question 0?": 6, "Question 1?": 2, "Question 2?": 3}


@pytest.fixture
def out(tmp_path):
    """`--output_path`; what this process asked for before is forgotten."""
    verdicts_once.cache_clear()
    return argparse.Namespace(output_path=str(tmp_path / "out"))


@pytest.fixture
def rows(mmhal_folder):
    """The rows that lmms-eval gives to a metric."""
    documents = utils.read_documents(mmhal_folder)
    results = [utils.process_results(doc, [f"It is {doc['image_id']}."]) for doc in documents]
    metrics = {f"mmhal_{name}" for name in ("score", "hallucination_rate", "answers", "words")}
    assert metrics < results[0].keys()
    return [each["mmhal_score"] for each in results]


def question_of(prompt):
    return re.search("Question: (.*)", prompt)[1]


def stored(out):
    return json.loads(
        utils.Path(out.output_path, "submissions/mmhal_bench_answers.json").read_text()
    )


def scores(rows, out):
    verdicts_once.cache_clear()
    measures = utils.score, utils.hallucination_rate, utils.missing_verdicts
    return [measure(rows, out) for measure in measures]


def test_documents_are_the_publishers_records_with_images(mmhal_folder):
    first, *_ = utils.read_documents(mmhal_folder)
    assert first["image"] == str(mmhal_folder / "images/0_o.jpg")
    assert first["image_content"] == ["Fire hydrant", "Tree"]
    assert utils.doc_to_text(first, {"pre_prompt": "", "post_prompt": ""}) == "Question 0?"
    (mmhal_folder / "images/2_o.jpg").unlink()
    with pytest.raises(TaskError, match=r"images: 1 of 3 images are missing: 2_o.jpg$"):
        utils.read_documents(mmhal_folder)


def test_the_judge_gets_the_publishers_prompt(rows, out, judge_server):
    utils.score(rows, out)
    prompts = sorted(body["messages"][0]["content"] for _, body in judge_server.requests)
    assert prompts[0] == (
        "Rate.\nContents: Fire hydrant, Tree\nQuestion: Question 0?\nStandard: Yellow.\n"
        "Response: It is id0.\n"
    )


def test_scores_are_of_the_ratings(rows, out, judge_server):
    judge_server.reply = lambda prompt: f"So.\nRating: {RATINGS[question_of(prompt)]}, because"
    assert scores(rows, out) == [11 / 3, 100 / 3, 0]
    assert utils.score_attribute(rows, out) == 4.5
    assert utils.score_other(rows, out) == 2
    assert utils.score_counting(rows, out) == "N/A"
    assert len(judge_server.requests) == 3
    assert [row["rating"] for row in stored(out)] == [6, 2, 3]
    assert stored(out)[0]["judge_review"].startswith("So.")


def test_without_a_judge_answers_are_stored_and_counted(rows, out):
    assert scores(rows, out) == ["N/A", "N/A", 3]
    assert utils.answers([*rows, {"model_answer": " "}]) == 3
    assert utils.words(rows) == 3
    assert [row["model_answer"] for row in stored(out)] == [
        "It is id0.",
        "It is id1.",
        "It is id2.",
    ]
    assert "rating" not in stored(out)[0]


def test_a_missing_verdict_is_counted_and_asked_for_later(rows, out, judge_server, capsys):
    """By the same command, or by the module itself, which needs no model."""
    judge_server.reply = lambda prompt: 401 if "id1" in prompt else "Rating: 4"
    assert scores(rows, out) == [4, 0, 1]
    assert len(judge_server.requests) == 3  # once for all metrics
    assert ["rating" in row for row in stored(out)] == [True, False, True]
    judge_server.requests.clear()
    judge_server.reply = lambda prompt: "**Rating:** 1"
    verdicts_once.cache_clear()
    utils.main([out.output_path])
    assert capsys.readouterr().out == (
        "mmhal_bench mmhal_score: 3.0\n"
        f"mmhal_bench mmhal_hallucination_rate: {100 / 3}\n"
        "mmhal_bench mmhal_missing_verdicts: 0\n"
    )
    assert len(judge_server.requests) == 1
    assert [row["rating"] for row in stored(out)] == [4, 1, 4]


def test_verdicts_that_came_later_are_in_the_scores_of_the_evaluation(rows, out, judge_server):
    judge_server.reply = lambda prompt: 401
    assert scores(rows, out) == ["N/A", "N/A", 3]
    file = utils.Path(out.output_path, "scores.json")
    others = {"mmhal_words": 3.0, "expert_load": []}
    before = {"gqa": {"exact_match": 0.5}, "mmhal_bench": {"mmhal_missing_verdicts": 3, **others}}
    file.write_text(json.dumps(before))
    judge_server.reply = lambda prompt: f"Rating: {RATINGS[question_of(prompt)]}"
    verdicts_once.cache_clear()
    utils.main([out.output_path])
    assert json.loads(file.read_text()) == {
        "gqa": {"exact_match": 0.5},
        "mmhal_bench": {
            "mmhal_missing_verdicts": 0,
            **others,
            "mmhal_score": 11 / 3,
            "mmhal_hallucination_rate": 100 / 3,
            "mmhal_score_attribute": 4.5,
            "mmhal_score_other": 2.0,
        },
    }


def test_stored_verdicts_count_without_a_judge(rows, out, judge_server, monkeypatch, capsys):
    judge_server.reply = lambda prompt: 401 if "id1" in prompt else "Rating: 4"
    scores(rows, out)
    before = stored(out)
    monkeypatch.delenv("JUDGE_BASE_URL")
    utils.main([out.output_path])
    assert "mmhal_bench mmhal_score: 4.0\n" in capsys.readouterr().out
    assert scores(rows, out) == [4, 0, 1] and stored(out) == before
    other = [{**rows[0], "model_answer": "Something else."}, *rows[1:]]
    assert scores(other, out) == [4, 0, 2]


def test_answers_that_are_not_there_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        utils.main([str(tmp_path)])
    message = "error: output_path: expected .*submissions/mmhal_bench_answers.json$"
    assert re.search(message, capsys.readouterr().err.strip())
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions/mmhal_bench_answers.json").write_text("[{")
    with pytest.raises(SystemExit, match=r"^error: .*answers.json: expected JSON"):
        utils.main([str(tmp_path)])


@pytest.mark.parametrize("content", [[], {}, [1], [{"task": "mmhal_bench"}]])
def test_stored_answers_of_another_form_are_one_line(content, tmp_path):
    (tmp_path / "submissions").mkdir()
    (tmp_path / "submissions/mmhal_bench_answers.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=r"^error: .*answers.json: expected rows with task, quest"):
        utils.main([str(tmp_path)])


@pytest.mark.parametrize("change", [{"model_answer": None}, {"rating": "5"}, {"rating": 7}])
def test_stored_rows_have_an_answer_and_a_rating_in_range(change, rows, out):
    utils.score(rows, out)
    path = utils.Path(out.output_path, "submissions/mmhal_bench_answers.json")
    path.write_text(json.dumps([{**rows[0], **change}]))
    with pytest.raises(TaskError, match="expected rows with"):
        utils.read_answers(path)


def test_answers_of_a_variant_have_their_own_file(mmhal_folder, out):
    [doc, *_] = utils.read_documents(mmhal_folder, "mmhal_bench_llava_mod")
    rows = [utils.process_results(doc, ["Yellow."])["mmhal_score"]]
    utils.score(rows, out)
    folder = utils.Path(out.output_path, "submissions")
    assert [path.name for path in folder.iterdir()] == ["mmhal_bench_llava_mod_answers.json"]


def test_a_judge_without_the_publishers_prompt_is_an_error(mmhal_folder, rows, out, judge_server):
    (mmhal_folder / "eval_gpt4.py").write_text("other = 'x'\n")
    with pytest.raises(
        TaskError, match=r"^\$MMHAL_BENCH_DIR: a judge needs the prompt of eval_gpt4"
    ):
        utils.score(rows, out)


@pytest.mark.parametrize(
    ("review", "rating"),
    [
        ("Rating: 0, not informative", 0),
        ("it is good. rating: 6", 6),
        ("**Rating: 5**", 5),
        ("**Rating:** 5", 5),
        ("Rating: 4 ... so again: Rating: 4", 4),
        ("Rating: 4 or Rating: 5", None),
        ("Rating: 7", None),
        ("Rating: 60", None),
        ("five", None),
    ],
)
def test_a_review_has_one_rating(review, rating, rows, out, judge_server, monkeypatch):
    monkeypatch.setenv("JUDGE_TRIES", "1")
    judge_server.reply = lambda prompt: review
    assert utils.score(rows, out) == ("N/A" if rating is None else rating)
