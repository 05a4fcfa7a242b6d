"""Questions and scores of the easy-VQA task."""

import json

import pytest

from moddistill.evals import easy_vqa
from moddistill.evals.task import Question


def rows(*pairs):
    return [{"question": "?", "answers": [a], "prediction": p} for a, p in pairs]


def write(folder, turns):
    record = {"id": "test-0", "image": "test/7.png", "conversations": turns}
    (folder / "test.json").write_text(json.dumps([record]))


@pytest.mark.parametrize("answer", ["no", "teal"])
def test_questions_are_read_as_published(tmp_path, answer):
    write(
        tmp_path,
        [{"from": "human", "value": "<image>\nis it red?"}, {"from": "gpt", "value": answer}],
    )
    (question,) = easy_vqa.questions(tmp_path)
    image = str(tmp_path / "images/test/7.png")
    assert question == Question(
        id="test-0", prompt="<image>\nis it red?", images=(image,), answers=(answer,)
    )


def test_missing_data_is_an_error_that_names_the_command(tmp_path):
    with pytest.raises(
        ValueError, match=r"test\.json: expected a file of .*tools\.easy_vqa.*, got none"
    ):
        easy_vqa.questions(tmp_path)


def test_a_record_with_several_questions_is_an_error(tmp_path):
    write(tmp_path, [{"from": "human", "value": "?"}, {"from": "gpt", "value": "no"}] * 2)
    with pytest.raises(ValueError, match=r"record test-0: expected roles \['human', 'gpt'\], got"):
        easy_vqa.questions(tmp_path)


def test_scores_equal_a_count_by_hand():
    scores = easy_vqa.score(
        rows(
            ("yes", " Yes\n"),
            ("yes", "no"),
            ("no", "yes"),
            ("no", "no"),
            ("no", "red"),
            ("no", "no"),
            ("red", "RED"),
            ("circle", "a circle"),
        )
    )
    assert scores == {
        "questions": 8,
        "accuracy": 4 / 8,
        "accuracy_yes_no": 3 / 6,
        "accuracy_other": 1 / 2,
        "false_yes_rate": 1 / 4,
        "unparsed": 1,
    }


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        ((), "accuracy"),
        (("red",), "accuracy_yes_no"),
        (("yes", "no"), "accuracy_other"),
        (("yes", "red"), "false_yes_rate"),
    ],
)
def test_a_rate_without_questions_is_an_error(answers, name):
    with pytest.raises(ValueError, match=f"^{name}: expected at least one question"):
        easy_vqa.score(rows(*[(answer, answer) for answer in answers]))
