"""Images of tasks."""

import pytest
from PIL import Image

from moddistill.evals.tasks._task_utils.errors import TaskError
from moddistill.evals.tasks._task_utils.published_files import check_images, open_image, read_json


def test_an_image_is_a_file_or_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (3, 2), (1, 2, 3, 255)).save(path)
    for image in (
        {"path": str(path), "bytes": None},
        {"path": None, "bytes": path.read_bytes()},
    ):
        opened = open_image(image, 1)
        assert (opened.mode, opened.size, opened.getpixel((0, 0))) == ("RGB", (3, 2), (1, 2, 3))


def test_an_unreadable_image_names_the_question_and_the_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("no image")
    with pytest.raises(TaskError, match=r"^image of question 3 in .*a\.png: cannot identify"):
        open_image({"path": str(path), "bytes": None}, 3)
    with pytest.raises(TaskError, match=r"^image of question 4 in the publisher's file: "):
        open_image({"path": None, "bytes": b"no image"}, 4)


def test_many_missing_images_are_shortened(tmp_path):
    paths = [tmp_path / f"{number}.jpg" for number in range(5)]
    with pytest.raises(TaskError, match=r"5 of 5 images are missing: 0.jpg, 1.jpg, 2.jpg, \.\.\.$"):
        check_images(paths)


def test_lines_of_json_end_at_line_feeds_only(tmp_path):
    """A text may have other line separators in it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n{"a": "z"}\n')
    assert read_json(path) == [{"a": "x\u2028y"}, {"a": "z"}]


@pytest.mark.parametrize(("name", "text"), [("a.json", '{"a": ['), ("a.jsonl", "{}\n{")])
def test_a_file_that_was_not_downloaded_completely_is_named(name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TaskError, match=rf"{name}: expected JSON, got invalid text: "):
        read_json(path)
