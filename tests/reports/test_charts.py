"""Curves, intervals and loads."""

import re

import pytest

from moddistill.evals.bootstrap import Estimate
from moddistill.reports import charts
from moddistill.reports.specialisation import distance, load_card
from tests.reports.test_report import METRICS


def test_a_stage_card_shows_throughput_and_curves_of_all_metrics():
    heldout = {"step": 20, "heldout_loss": 0.75}
    card = charts.stage_card("d2d", [METRICS[0], METRICS[1] | {"ce": 0.5}, heldout])
    assert "20 steps · 6 s · 1,100 tokens/s" in card
    assert re.findall(r"<b>(\w+)</b><span>([\d.,]+)</span>", card) == [
        ("loss", "0.5"),
        ("kd", "0.25"),
        ("ce", "0.5"),
        ("tokens_per_second", "1,100"),
        ("heldout_loss", "0.75"),
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
    ("value", "text"),
    [(0.12345, "0.123"), (6.85e-7, "6.85e-7"), (1.5e10, "1.5e10"), (2.0, "2"), (24029.7, "24,030")],
)
def test_numbers_have_three_significant_digits_or_are_written_out(value, text):
    assert charts.number(value) == text


def test_an_interval_is_drawn_on_an_axis_around_zero():
    drawn = charts.interval_bar(Estimate(-0.1, -0.2, 0.1), 0.2, "d2s: -0.100")
    assert 'class="zero" style="left:50.00%"' in drawn
    assert 'class="ends-of" style="left:0.00%;width:75.00%"' in drawn
    assert 'class="at" style="left:25.00%"' in drawn and 'aria-label="d2s: -0.100"' in drawn
    assert 'class="at" style="left:50.00%"' in charts.interval_bar(Estimate(0.0, 0.0, 0.0), 0.0, "")


def test_expert_loads_are_shown_as_shares():
    card = load_card({"layer": 2, "image": [3, 1], "text": [0.5, 0.5]})
    assert "Layer 2" in card
    assert re.findall(r"<span>(\d+%)</span>", card) == ["75%", "50%", "25%", "50%"]
    assert re.findall(r"width:([\d.]+)%", card) == ["75.00", "50.00", "25.00", "50.00"]
    assert card.count("--even:50.00%") == 2


def test_questions_without_images_have_a_load_of_text_only():
    card = load_card({"layer": 2, "image": [0, 0], "text": [3, 1]})
    assert re.findall(r"<span>(\d+%)</span>", card) == ["0%", "75%", "0%", "25%"]
    with pytest.raises(ValueError, match=r"expected image loads >= 0 with a sum > 0, got \[0, 0\]"):
        load_card({"layer": 2, "image": [0, 0], "text": [0, 0]})


def test_a_share_above_twice_the_even_one_stretches_the_scale():
    card = load_card({"layer": 0, "image": [8, 1, 1, 0], "text": [1, 1, 1, 1]})
    assert re.findall(r"width:([\d.]+)%", card)[:2] == ["100.00", "31.25"]
    assert card.count("--even:31.25%") == 4


def test_loads_are_compared_by_their_total_variation():
    assert distance([1, 1], [5, 5]) == 0
    assert distance([1, 0], [0, 3]) == 1
    assert distance([3, 1], [1, 1]) == 0.25
    assert distance([0, 0], [1, 1]) is None  # questions without images


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
        ([2, -1], r"layer 3: expected image loads >= 0 .*, got \[2, -1\]"),
        ([1, 1, 1], "layer 3: expected as many text loads as image loads, 3, got 2"),
    ],
)
def test_invalid_expert_loads_are_an_error(image, message):
    with pytest.raises(ValueError, match=message):
        load_card({"layer": 3, "image": image, "text": [1, 1]})
