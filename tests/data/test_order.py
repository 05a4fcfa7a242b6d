import math
from collections import Counter

import numpy as np
import pytest

from moddistill.data import order
from moddistill.data.order import Order, permute


def elements(size):
    return np.arange(size, dtype=np.uint64)


def epoch(made, number):
    """The (source, record) pairs of one epoch."""
    count = made.windows_per_epoch
    windows = [made.window(number * count + i) for i in range(count)]
    pairs = [zip(*(x.tolist() for x in window), strict=True) for window in windows]
    return [pair for window in pairs for pair in window]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4096])
def test_permutation_holds_each_element_once(size):
    assert sorted(permute(elements(size), size, (0,))) == list(range(size))


def test_permutation_of_a_part_is_that_part_of_the_permutation():
    whole = permute(elements(1000), 1000, (3, 1))
    np.testing.assert_array_equal(permute(elements(1000)[17:40], 1000, (3, 1)), whole[17:40])


def test_permutations_of_different_keys_are_all_about_equally_likely():
    counts = Counter(tuple(permute(elements(4), 4, (key,)).tolist()) for key in range(4800))
    assert len(counts) == math.factorial(4)
    # 200 expected; a standard deviation is 14.
    assert min(counts.values()) > 130 and max(counts.values()) < 270


def test_permutation_leaves_no_trend():
    moved = permute(elements(20_000), 20_000, (5,))
    assert abs(np.corrcoef(elements(20_000), moved)[0, 1]) < 0.03
    # Neighbours of a random permutation are a third of its size apart.
    assert 0.32 < np.abs(np.diff(moved)).mean() / 20_000 < 0.35


def test_permutation_is_the_same_in_every_release():
    """Runs that were saved by one release are resumed by the next."""
    assert permute(elements(10), 10, (0, 1, 2)).tolist() == [7, 4, 6, 5, 8, 0, 1, 3, 9, 2]


@pytest.mark.parametrize("window", [4, 1024])
def test_each_epoch_holds_each_record_once_in_another_order(window, monkeypatch):
    monkeypatch.setattr(order, "WINDOW", window)
    made = Order((12, 5), (1.0, 1.0), seed=0)
    first, second = epoch(made, 0), epoch(made, 1)
    expected = [(0, i) for i in range(12)] + [(1, i) for i in range(5)]
    assert sorted(first) == sorted(second) == expected
    assert first != second


def test_order_depends_on_the_seed_and_not_on_what_was_read_before():
    made = Order((50,), (1.0,), seed=0)
    later = made.window(7)
    np.testing.assert_array_equal(Order((50,), (1.0,), seed=0).window(7).record, later.record)
    assert np.any(Order((50,), (1.0,), seed=1).window(7).record != later.record)


def test_weights_are_uses_of_each_record_in_an_epoch():
    made = Order((10, 8), (2.0, 0.25), seed=0)
    counts = Counter(epoch(made, 0))
    assert [counts[0, i] for i in range(10)] == [2] * 10
    assert sum(counts[1, i] for i in range(8)) == 2
    # Four epochs use each record of the second source once.
    later = Counter(pair for number in range(4) for pair in epoch(made, number))
    assert [later[1, i] for i in range(8)] == [1] * 8


def test_every_window_has_the_proportions_of_the_mixture(monkeypatch):
    monkeypatch.setattr(order, "WINDOW", 100)
    made = Order((6000, 3000, 500), (1.0, 1.0, 1.0), seed=0)
    for number in range(made.windows_per_epoch):
        counts = np.bincount(made.window(number).source, minlength=3)
        expected = np.array([6000, 3000, 500]) / made.windows_per_epoch
        assert np.all(np.abs(counts - expected) < 1)


def test_sources_of_equal_size_are_shuffled_independently():
    window = Order((100, 100), (1.0, 1.0), seed=0).window(0)
    assert np.any(window.record[window.source == 0] != window.record[window.source == 1])
