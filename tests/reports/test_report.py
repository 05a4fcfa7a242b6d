"""The report page: its sections, marks of answers, problems, and that it needs no other file."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from moddistill.errors import UserError
from moddistill.evals.task import Column, Task, exact_match
from moddistill.reports.report import write_report
from moddistill.reports.specialisation import specialisation_table
from moddistill.reports.workdirs import Content, Results, Run

VOID = {"meta", "img", "br", "input"}
METRICS = [
    {"step": 10, "loss": 2.0, "kd": 1.5, "seconds": 3.0, "tokens_per_second": 900.0},
    {"step": 20, "loss": 0.5, "kd": 0.25, "seconds": 6.0, "tokens_per_second": 1100.0},
]
LOADS = [{"layer": 2, "image": [3, 1], "text": [0.5, 0.5]}]
TASK = Task(
    questions=lambda folder: [],
    score=lambda rows: {},
    is_correct=exact_match,
    max_new_tokens=1,
    columns=(Column("recall", "Recall"),),
    note="Shares & counts.",
)


class Balance(HTMLParser):
    """Fails on a tag that is not closed in order; collects tags and what they refer to."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.links, self.ids = [], [], [], []
        self.feed(page)
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)
        anchors = {link[1:] for link in self.links if link.startswith("#")}
        assert anchors <= set(self.ids)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def row(number, prediction, images=(), **more):
    question = {"id": str(number), "question": "is 1 < 2 & 3?", "images": list(images)}
    return question | {"answers": ["yes", "yes <it> is"], "prediction": prediction} | more


def results(model, rows, task="x < y", loads=()):
    return Results(
        model=model,
        task=task,
        scores={"recall": 0.95124, "hidden": 1},
        loads=loads,
        rows=rows,
        definition=TASK,
        images=Path(),
    )


@pytest.fixture
def content(tmp_path):
    """A run, and a teacher and a sparse student that answered three questions; one has an image."""
    image = tmp_path / "a.png"
    Image.new("RGB", (600, 300), "red").save(image)
    return Content(
        runs=[Run(name="d2d <x>", rows=METRICS, teacher="runs/z/teacher/model")],
        results=[
            results("teacher", [row(0, " Yes", [str(image)]), row(1, "yes"), row(2, "no")]),
            results(
                "d2s & more",
                [row(0, "<script>no", [str(image)]), row(1, "yes"), row(2, "no")],
                loads=LOADS,
            ),
        ],
    )


def write(tmp_path, content, **settings):
    write_report(tmp_path / "report.html", content, "A & B", **settings)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def titles(page):
    return re.findall(r"<h2>(.*)</h2>", page)


def test_the_page_is_well_formed_and_needs_no_other_file(tmp_path, content):
    page = write(tmp_path, content)
    parsed = Balance(page)
    assert "script" not in parsed.tags
    files = [link for link in parsed.links if not link.startswith("#")]
    assert len(files) == 1
    assert files[0].startswith("data:image/png;base64,")
    assert "http" not in page and "url(" not in page
    assert "prefers-color-scheme: dark" in page


def test_text_in_the_page_is_escaped(tmp_path, content):
    page = write(tmp_path, content)
    for text in ("A &amp; B", "d2d &lt;x&gt;", "is 1 &lt; 2 &amp; 3?", "&lt;script&gt;no"):
        assert text in page
    for text in ("x &lt; y", "Shares &amp; counts.", "yes / yes &lt;it&gt; is", "d2s &amp; more"):
        assert text in page


def test_answers_are_marked_by_symbol_and_colour(tmp_path, content):
    page = write(tmp_path, content)
    answers = re.findall(r'<dd class="(\w+)">\s<span role="img" aria-label="\w+">(.)</span>', page)
    right, wrong = ("right", "✓"), ("wrong", "✗")
    assert answers == [right, wrong, right, right, wrong, wrong]


def test_examples_are_chosen_by_outcome_without_a_program(tmp_path, content):
    """Radio buttons and rules of style: usable with a keyboard, and wherever scripts are not."""
    page = write(tmp_path, content)
    marks = re.findall(r'<article class="card example ([\w -]*)">', page)
    assert marks == ["differ some-wrong", "", "some-wrong"]
    assert re.findall(r'type="radio" name="(.*?)" class="(.*?)"( checked)?>', page) == [
        ("show-x-y", "only-all", " checked"),
        ("show-x-y", "only-differ", ""),
        ("show-x-y", "only-wrong", ""),
        ("show-x-y", "only-right", ""),
    ]
    for kind in ("differ", "wrong", "right"):
        assert f".answers:has(.only-{kind}:checked)" in page


def test_partial_and_missing_scores_are_shown(tmp_path, content):
    rows = [
        row(0, "a", metrics={"exact_match": 0.3}),
        row(1, "b", metrics={"pope": {"question_id": "1", "score": 1.0}}),
        row(2, "c", metrics={"submission": {"image": "x"}}),
    ]
    found = dataclasses.replace(results("model", rows), definition=None)
    page = write(tmp_path, Content(results=[found]))
    answers = re.findall(r'<dd class="(\w+)">\s<span role="img" aria-label="\w+">(.*)</span>', page)
    assert answers == [("partly", "0.30"), ("right", "✓"), ("unscored", "·")]


def test_tasks_without_scores_of_questions_are_named(tmp_path):
    """AMBER's, for example, are computed from counts of all answers."""
    counts, score = ({"amber": {"objects": 3, "hallucinated": 1}}, {"exact_match": 1.0})
    tasks = {"x < y": [counts] * 2, "more": [counts], "partly": [counts, score], "no samples": []}
    found = [
        dataclasses.replace(
            results("model", [row(n, "a", metrics=each) for n, each in enumerate(metrics)], task),
            definition=None,
        )
        for task, metrics in tasks.items()
    ]
    page = write(tmp_path, Content(results=found))
    assert titles(page)[1:3] == ["partly: interval", "Tasks without intervals"]
    assert "The samples of x &lt; y, more have no score for each question" in page


def test_the_sections_are_those_that_there_is_content_for(tmp_path, content):
    assert titles(write(tmp_path, content)) == [
        "Results", "x &lt; y against teacher", "Training", "Answers: x &lt; y",
        "Expert load: x &lt; y", "Specialisation",
    ]  # fmt: skip
    assert titles(write(tmp_path, Content(runs=content.runs))) == ["Results", "Training"]
    dense = [dataclasses.replace(each, loads=()) for each in content.results]
    one = titles(write(tmp_path, Content(results=dense[:1])))
    assert one == ["Results", "x &lt; y: interval", "Answers: x &lt; y"]


def cells(page, model):
    [line] = re.findall(
        rf"<tr><td>{model}</td>(.*?)</tr>", page.split("Difference, drawn")[1].split("</table>")[0]
    )
    return re.findall(r"<td>(?:<small>)?(.*?)(?:</small>)?</td>", line)


def test_differences_are_from_the_teacher_over_shared_questions(tmp_path, content):
    student = content.results[1]
    student = dataclasses.replace(student, rows=[*student.rows[:2], row(9, "yes")])
    page = write(tmp_path, Content(results=[student, content.results[0]], runs=content.runs))
    assert cells(page, "teacher")[:2] == ["3", "0.667"]
    questions, score, _, difference, between, _ = cells(page, "d2s &amp; more")
    assert (questions, score) == ("3", "0.667")  # of its own
    assert (difference, between) == ("-0.500", "-1.000 to +0.000")  # of questions 0 and 1


def test_another_model_may_be_the_one_compared_with(tmp_path, content):
    page = write(tmp_path, content, teacher="d2s & more")
    assert "x &lt; y against d2s &amp; more" in page
    assert cells(page, "teacher")[3] == "+0.333"
    with pytest.raises(
        UserError, match=r"^--teacher: expected one of 'teacher', 'd2s & more', got"
    ):
        write(tmp_path, content, teacher="d2s")


def with_images(content, images):
    rows = [row(0, "yes", images)]
    return Content(results=[dataclasses.replace(content.results[0], rows=rows)])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_example_shows_all_its_images(tmp_path, content, count):
    images = content.results[0].rows[0]["images"] * count
    links = Balance(write(tmp_path, with_images(content, images))).links
    assert sum(link.startswith("data:") for link in links) == count


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_photographs_are_small_jpeg(tmp_path, content, mode):
    file = tmp_path / "noise.png"
    Image.effect_noise((600, 600), 90).convert(mode).save(file)
    page = write(tmp_path, with_images(content, [str(file)]))
    [data] = re.findall(r'class="photo" src="data:image/jpeg;base64,(.*?)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (256, 256)


def test_damaged_images_are_listed(tmp_path, content):
    file = tmp_path / "noise.png"
    Image.effect_noise((400, 400), 90).save(file)
    whole = file.read_bytes()
    place = whole.rindex(b"IDAT")  # the name of the last chunk of pixels
    file.write_bytes(whole[:place] + bytes(4) + whole[place + 4 :])
    page = write(tmp_path, with_images(content, [str(file), "null\0byte.png"]))
    assert "2 images of examples cannot be read" in page


def test_tasks_whose_models_have_other_experts_are_not_compared(tmp_path, content):
    rows = content.results[0].rows
    for task, load in (("a", [1, 2]), ("b", [2, 1]), ("c", [1, 2, 3])):
        loads = [{"layer": 0, "image": load, "text": load}]
        content.results.append(results("sparse", rows, task=task, loads=loads))
    _, table = specialisation_table(content)
    found = {row["task"]: row["tasks"] for row in table if row["model"] == "sparse"}
    assert found == {"a": pytest.approx(1 / 3), "b": pytest.approx(1 / 3), "c": None}


def test_what_cannot_be_drawn_is_listed_and_the_rest_is_shown(tmp_path, content):
    content.results[0].rows[1]["images"] = ["nowhere.png"]
    content.runs.append(Run(name="bad", rows=[{"step": 1, "loss": float("nan")}]))
    bad = [{"layer": 3, "image": [2, -1], "text": [1, 1]}]
    content.results.append(results("odd", content.results[0].rows, loads=bad))
    content.problems.append("metrics.jsonl: cut")
    page = write(tmp_path, content)
    assert titles(page)[0] == "Not read"
    assert re.findall(r"<li>(.*?)</li>", page) == [
        "metrics.jsonl: cut",
        "bad: curve &#x27;loss&#x27;: expected a finite number at step 1, got nan",
        "x &lt; y: 1 images of examples cannot be read, as nowhere.png",
        "odd, x &lt; y: layer 3: expected image loads &gt;= 0 with a sum &gt; 0, got [2, -1]",
    ]
    assert "<h3>d2d &lt;x&gt;</h3>" in page and "d2s &amp; more, layer 2" in page
