"""The report page: charts, marks of answers, and that it is self-contained."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from moddistill.evals.task import Column
from moddistill.reports import charts, report

VOID = {"meta", "img", "br"}
COLUMNS = (Column("model", "Model", ""), Column("recall", "Recall"))
METRICS = [
    {"step": 10, "loss": 2.0, "kd": 1.5, "seconds": 3.0, "tokens_per_second": 900.0},
    {"step": 20, "loss": 0.5, "kd": 0.25, "seconds": 6.0, "tokens_per_second": 1100.0},
]


class Balance(HTMLParser):
    """Fails on a tag that is not closed in order; collects tags and what they refer to."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.links = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def parts(tmp_path):
    image = tmp_path / "a.png"
    Image.new("RGB", (600, 300), "red").save(image)
    example = {
        "images": [str(image)],
        "question": "is 1 < 2 & 3?",
        "answers": ["yes", "yes <it> is"],
        "predictions": {"teacher": (" Yes", True), "d2s & more": ("<script>no", False)},
    }
    return {
        "title": "A & B",
        "stages": {"d2d <x>": METRICS},
        "columns": COLUMNS,
        "table": [{"model": "teacher", "recall": 0.95124}],
        "tasks": [
            report.TaskSection(
                title="x < y",
                note="Shares & counts.",
                examples=[example],
                loads=[{"layer": 2, "image": [3, 1], "text": [0.5, 0.5]}],
            )
        ],
    }


def write(tmp_path, parts):
    report.write_report(tmp_path / "report.html", **parts)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_self_contained(tmp_path, parts):
    page = write(tmp_path, parts)
    parsed = Balance(page)
    assert "script" not in parsed.tags
    assert len(parsed.links) == 1
    assert parsed.links[0].startswith("data:image/png;base64,")
    assert "http" not in page and "url(" not in page
    assert "prefers-color-scheme: dark" in page


def test_text_in_the_page_is_escaped(tmp_path, parts):
    page = write(tmp_path, parts)
    for text in ("A &amp; B", "d2d &lt;x&gt;", "is 1 &lt; 2 &amp; 3?", "&lt;script&gt;no"):
        assert text in page
    for text in ("x &lt; y", "Shares &amp; counts.", "yes / yes &lt;it&gt; is", "d2s &amp; more"):
        assert text in page


def test_answers_are_marked_by_symbol_and_colour(tmp_path, parts):
    page = write(tmp_path, parts)
    answers = re.findall(r'<dd class="(\w+)">\s<span role="img" aria-label="\w+">(.)</span>', page)
    assert answers == [("right", "✓"), ("wrong", "✗")]


def test_a_stage_card_shows_throughput_and_curves_of_all_metrics():
    card = charts.stage_card("d2d", METRICS)
    assert "20 steps · 6 s · 1,100 tokens/s" in card
    assert re.findall(r"<b>(\w+)</b><span>([\d.]+)</span>", card) == [
        ("loss", "0.5"),
        ("kd", "0.25"),
    ]


def test_a_curve_spans_its_own_range():
    drawn = charts.curve("loss", [(0, 4.0), (50, 1.0), (100, 2.0)])
    assert 'd="M0.0 0.0L150.0 100.0L300.0 66.7"' in drawn
    assert '<div class="ends up"><span>4</span><span>1</span></div>' in drawn


@pytest.mark.parametrize("points", [[(5, 1.0)], [(5, 1.0), (6, 1.0)]])
def test_a_flat_curve_is_in_the_middle(points):
    drawn = charts.curve("loss", points)
    assert 'd="M0.0 50.0' in drawn
    assert '<div class="ends up"><span>1</span><span></span></div>' in drawn


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (6.85e-7, "6.85e-7"), (1.5e10, "1.5e10"), (2.0, "2")]
)
def test_numbers_have_three_significant_digits(value, text):
    assert charts.number(value) == text


def test_expert_loads_are_shown_as_shares():
    card = charts.load_card({"layer": 2, "image": [3, 1], "text": [0.5, 0.5]})
    assert "Layer 2" in card
    assert re.findall(r"<span>(\d+%)</span>", card) == ["75%", "50%", "25%", "50%"]
    assert re.findall(r"width:([\d.]+)%", card) == ["75.00", "50.00", "25.00", "50.00"]
    assert card.count("--even:50.00%") == 2


def test_a_share_above_twice_the_even_one_stretches_the_scale():
    card = charts.load_card({"layer": 0, "image": [8, 1, 1, 0], "text": [1, 1, 1, 1]})
    assert re.findall(r"width:([\d.]+)%", card)[:2] == ["100.00", "31.25"]
    assert card.count("--even:31.25%") == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "stage 'd2d': expected 'loss' in a row of metrics, got 0 rows"),
        (
            [{"step": 1, "loss": float("nan")}],
            "curve 'loss': expected a finite number at step 1, got nan",
        ),
    ],
)
def test_a_stage_without_finite_losses_is_an_error(rows, message):
    with pytest.raises(ValueError, match=message):
        charts.stage_card("d2d", rows)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([0, 0], r"layer 3: expected image loads >= 0 with a sum > 0, got \[0, 0\]"),
        ([2, -1], r"layer 3: expected image loads >= 0 .*, got \[2, -1\]"),
        ([1, 1, 1], "layer 3: expected as many text loads as image loads, 3, got 2"),
    ],
)
def test_invalid_expert_loads_are_an_error(image, message):
    with pytest.raises(ValueError, match=message):
        charts.load_card({"layer": 3, "image": image, "text": [1, 1]})


def with_images(parts, images):
    [task] = parts["tasks"]
    example = task.examples[0] | {"images": images}
    return parts | {"tasks": [dataclasses.replace(task, examples=[example])]}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_example_shows_all_its_images(tmp_path, parts, count):
    images = parts["tasks"][0].examples[0]["images"] * count
    assert len(Balance(write(tmp_path, with_images(parts, images))).links) == count


def test_each_task_has_a_section_and_only_sparse_models_have_loads(tmp_path, parts):
    [task] = parts["tasks"]
    parts["tasks"] = [task, dataclasses.replace(task, title="other", loads=[])]
    page = write(tmp_path, parts)
    assert re.findall(r"<h2>(.*)</h2>", page) == [
        "Results", "Training", "Answers: x &lt; y", "Expert load: x &lt; y", "Answers: other"
    ]  # fmt: skip


def test_a_missing_image_is_an_error(tmp_path, parts):
    with pytest.raises(ValueError, match=r"^nowhere\.png: expected the image file of an example"):
        write(tmp_path, with_images(parts, ["nowhere.png"]))
