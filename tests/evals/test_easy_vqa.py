"""Questions and scores of the easy-VQA task."""

import json

import pytest

from moddistill.errors import UserError
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


TURNS = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "no"}]


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../b.png", "a\\b.png"])
def test_an_image_outside_of_the_data_is_refused(tmp_path, name):
    record = {"id": "1", "image": name, "conversations": TURNS}
    (tmp_path / "test.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"^image: expected a file below .*images, .*, got '"):
        easy_vqa.questions(tmp_path)


def test_a_link_out_of_the_images_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").symlink_to("/dev/zero")
    record = {"id": "1", "image": "1.png", "conversations": TURNS}
    (tmp_path / "test.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"without '\.\.' or a link out of it, got '1\.png'"):
        easy_vqa.questions(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 10**5, "expected JSON, got invalid text"),
        ("{}", "expected a list of records, got {}"),
        ("[3]", "record: expected an object with id, image and conversations, got 3"),
        ('[{"id": "1"}]', "record: expected an object with id, image and conversations"),
        (
            '[{"id": "a\\u001b[2J", "image": "1", "conversations": [4]}]',
            r"record a\x1b[2J: expected roles ['human', 'gpt'], got [None]",
        ),
        (
            '[{"id": "1", "image": "1", "conversations": [{"from": "human"}, {"from": "gpt"}]}]',
            "record 1: expected two texts, got [None, None]",
        ),
    ],
)
def test_other_content_is_an_error_of_one_line(tmp_path, content, message):
    (tmp_path / "test.json").write_text(content)
    with pytest.raises(UserError) as error:
        easy_vqa.questions(tmp_path)
    assert message in str(error.value)
    assert str(error.value).isprintable()


def test_a_file_of_questions_without_end_is_refused(tmp_path):
    with (tmp_path / "test.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"test\.json: expected at most 67,108,864 bytes, got more"):
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
