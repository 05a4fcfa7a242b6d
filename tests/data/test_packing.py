import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest

from moddistill.data import order
from moddistill.data.order import Order
from moddistill.data.packing import RowPlan, best_fit
from moddistill.errors import UserError

LENGTHS = np.random.default_rng(0).integers(5, 60, 200)


def lengths_of(window):
    return LENGTHS[window.record]


def make_plan(packs=True, seed=0, size=200):
    return RowPlan(Order((size,), (1.0,), seed), lengths_of, 100, packs)


def read(plan, rows):
    return [plan.row(number) for number in rows]


def test_best_fit_by_hand():
    """8 and 2 fill a row; 5 fits only next to 4, and 3 next to nothing that is full."""
    groups = best_fit([2, 5, 8, 4, 3], 10)
    assert groups == [[2, 0], [1, 3], [4]]


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_holds_each_index_once_within_capacity(seed):
    lengths = np.random.default_rng(seed).integers(1, 101, 300)
    groups = best_fit(lengths, 100)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(300))
    assert all(sum(lengths[group]) <= 100 for group in groups)
    fewest = math.ceil(sum(lengths) / 100)
    assert len(groups) <= 11 / 9 * fewest + 1


def test_padding_at_the_lengths_of_llava_data():
    """576 image tokens and log-normal text: median 90, 95th percentile 500."""
    rng = np.random.default_rng(0)
    text = np.exp(rng.normal(np.log(90), np.log(500 / 90) / 1.645, 20 * order.WINDOW))
    for capacity, most in ((2048, 0.11), (4096, 0.07)):
        lengths = np.minimum(576 + text.astype(int), capacity)
        plan = RowPlan(
            Order((len(lengths),), (1.0,), 0), lambda w, x=lengths: x[w.record], capacity, True
        )
        rows = plan.rows_of(1)
        assert 1 - lengths.sum() / (rows * capacity) <= most


def test_rows_of_an_epoch_hold_each_record_once():
    plan = make_plan()
    for epoch in range(2):
        rows = range(plan.rows_of(epoch) if epoch else 0, plan.rows_of(epoch + 1))
        samples = [sample for row in read(plan, rows) for sample in row]
        assert Counter(sample.record for sample in samples) == Counter(range(200))
        assert all(sample.length == LENGTHS[sample.record] for sample in samples)


def test_rows_are_a_function_of_seed_and_number():
    rows = read(make_plan(), range(100))
    assert read(make_plan(), range(99, -1, -1)) == rows[::-1]
    assert read(make_plan(seed=1), range(100)) != rows


def test_rows_without_packing_have_one_sample_each():
    rows = read(make_plan(packs=False), range(200))
    assert {len(row) for row in rows} == {1}
    assert sorted(row[0].record for row in rows) == list(range(200))


def test_rows_of_a_window_are_not_sorted_by_length():
    """Best fit begins with the longest samples."""
    longest = [max(sample.length for sample in row) for row in read(make_plan(), range(50))]
    assert abs(np.corrcoef(longest, range(50))[0, 1]) < 0.5


def test_plan_in_another_process_has_the_same_rows_and_plans_none_again(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 20)
    plan = make_plan()
    expected = read(plan, range(150))
    copy = pickle.loads(pickle.dumps(plan))
    planned = []
    monkeypatch.setattr(
        Order, "window", lambda self, n, w=Order.window: planned.append(n) or w(self, n)
    )
    assert copy.row(149) == expected[149]
    assert len(planned) == 1


def test_rows_of_a_part_of_an_epoch(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 20)
    plan = make_plan()
    assert plan.rows_of(0.5) == pytest.approx(plan.rows_of(1) / 2, rel=0.2)
    assert plan.rows_of(2) > 1.9 * plan.rows_of(1)


def test_part_of_an_epoch_may_end_within_a_window():
    plan = make_plan()
    assert plan.order.windows_per_epoch == 1
    assert plan.rows_of(0.5) == round(plan.rows_of(1) / 2)
    assert plan.rows_of(1.25) == plan.rows_of(1) + round((plan.rows_of(2) - plan.rows_of(1)) / 4)
    assert plan.rows_of(1e-6) == 1


def test_epochs_of_too_many_samples_are_refused():
    with pytest.raises(UserError) as error:
        make_plan().rows_of(1e7)
    assert str(error.value) == (
        "config.epochs: expected at most 1,000,000,000 samples in all, not 2,000,000,000, or "
        "config.steps, got 10000000.0"
    )
