"""Units of scores against the aggregations of lmms-eval's tasks, and cases by hand."""

import importlib.util
import random
from pathlib import Path

import pytest

from moddistill.evals.bootstrap import point
from moddistill.evals.question_scores import units_of
from moddistill.evals.suite import read_suite
from moddistill.evals.tasks.amber import utils as amber
from moddistill.evals.tasks.mmhal_bench import utils as mmhal_bench
from moddistill.evals.tasks.object_halbench import utils as object_halbench

COUNTED = [{"mentions": m, "hallucinated": h} for m, h in [(4, 1), (2, 2), (0, 0), (2, 0)]]


def score(form, values):
    return point(units_of(form, [str(number) for number in range(len(values))], values))


@pytest.fixture(scope="module")
def task():
    """`task(name)`: the functions of a task of lmms-eval, without the rest of it."""
    pytest.importorskip("loguru")
    found = importlib.util.find_spec("lmms_eval")
    if found is None:
        pytest.skip("lmms-eval is not installed")

    def read(name):
        file = Path(found.submodule_search_locations[0]) / "tasks" / name / "utils.py"
        spec = importlib.util.spec_from_file_location(f"lmms_eval_{name}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return read


def test_mme_has_the_score_of_lmms_eval(task):
    rng, mme = random.Random(0), task("mme")
    values = []
    for number in range(90):
        category = ("color", "count", "OCR")[number % 3]
        for _ in range(2):
            doc = {"answer": rng.choice(["Yes", "No"]), "category": category}
            doc["question_id"] = f"{category}/{number}.png"
            [value] = mme.mme_process_results(doc, [rng.choice(["yes", "No.", "perhaps"])]).values()
            values.append(value)
    rng.shuffle(values)
    assert score("mme", values) == pytest.approx(mme.mme_aggregate_results(values), rel=1e-12)
    units = units_of("mme", [""] * len(values), values)
    assert len(units.ids) == 90 and list(units.strata) == sorted(units.strata)


def test_pope_has_the_f1_and_accuracy_of_lmms_eval(task):
    rng, pope = random.Random(0), task("pope")
    values = []
    for number in range(200):
        doc = {"answer": rng.choice(["yes", "no"]), "question_id": str(number)}
        answer = rng.choice(["Yes", "no", "maybe"])
        values.append(pope.pope_process_results(doc, [answer])["pope_f1_score"])
    assert score("f1", values) == pytest.approx(pope.pope_aggregate_f1_score(values), rel=1e-12)
    assert score("mean", values) == pytest.approx(pope.pope_aggregate_accuracy(values), rel=1e-12)


def choice(index, answer, prediction):
    options = {"A": "a fox", "B": "a red fox", "C": "nan", "D": None}
    return {"index": index, "answer": answer, "prediction": prediction} | options


def test_mmbench_reads_letters_or_the_text_of_one_option():
    right = ["B", "B.", "(B)", "B. a red fox", "a red fox"]
    wrong = ["A", "a fox, not a red fox", "nan", "", "Bird"]
    values = [choice(number, "B", text) for number, text in enumerate(right + wrong)]
    assert score("mmbench", values) == pytest.approx(100 * 5 / 10)
    assert score("mmbench", [choice(0, "A", "It is a fox.")]) == 100


def test_mmbench_needs_every_order_of_the_options():
    values = [choice(7, "A", "A"), choice(1_000_007, "B", "A"), choice(8, "A", "A")]
    assert score("mmbench", values) == 50


def test_amber_is_the_mean_of_chair_and_f1():
    described = [{"objects": 4, "hallucinated": 1}, {"objects": 0, "hallucinated": 0}]
    asked = [("no", "no"), ("no", "yes"), ("yes", "yes"), (None, "no")]
    values = [*described, *({"answer": a, "truth": t} for a, t in asked)]
    # CHAIR 25 %; F1 of "no": one right, two answered, two true.
    assert score("amber", values[::-1]) == pytest.approx((100 - 25 + 50) / 2)


def test_hallucination_rates_of_captions_and_of_judged_answers():
    assert score("responses", COUNTED) == pytest.approx(100 * 2 / 3)
    assert score("mentions", COUNTED) == pytest.approx(100 * 3 / 8)
    rated = [{"rating": 2}, {"rating": 3}, {"model_answer": "no verdict"}]
    assert score("mmhal", rated) == 50


# A few rows of our own tasks: the values of a metric, and the task's function.
OWN = {
    "amber_score": (
        [
            {"objects": 4, "hallucinated": 1},
            {"objects": 2, "hallucinated": 0},
            {"answer": "no", "truth": "no"},
            {"answer": "no", "truth": "yes"},
            {"answer": None, "truth": "no"},
        ],
        amber.overall,
    ),
    "mmhal_hallucination_rate": (
        [{"rating": rating} for rating in (0, 2, 3, 6, 5, 5)],
        mmhal_bench.hallucination_rate,
    ),
    "object_halbench_response": (COUNTED, object_halbench.response_rate),
    "object_halbench_mention": (COUNTED, object_halbench.mention_rate),
}
BENCHMARKS = [
    each
    for each in read_suite("llava-mod").benchmarks
    if each.task in ("amber", "mmhal_bench", "object_halbench")
]


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda each: each.name)
def test_units_of_our_tasks_have_their_scores_in_percent_as_the_paper(benchmark, monkeypatch):
    values, aggregation = OWN[benchmark.metric]
    ratings = [(row, row["rating"]) for row in values if "rating" in row]
    monkeypatch.setattr(mmhal_bench, "_ratings", lambda rows, args: ratings)
    expected = aggregation(values, *([None] if ratings else []))
    assert score(benchmark.units, values) == pytest.approx(expected)
    assert 1 < benchmark.scale * expected < 100


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("mean", []),
        ("mean", [{"prediction": "yes"}]),
        ("mean", [1.0, None]),
        ("mean", [[1.0], [0.0]]),
        ("mme", [1.0]),
        ("mmbench", [choice(0, "A", None)]),
    ],
)
def test_values_of_another_form_have_no_units(form, values):
    assert units_of(form, [str(number) for number in range(len(values))], values) is None
