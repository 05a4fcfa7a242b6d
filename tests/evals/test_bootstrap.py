"""Bootstrap intervals against theory, and that models are paired."""

import numpy as np
import pytest

from moddistill.evals import bootstrap
from moddistill.evals.bootstrap import Units, mean_units, ratio_units

IDS = [str(number) for number in range(400)]


def answers(seed, share):
    return (np.random.default_rng(seed).random(400) < share).astype(float)


def test_the_interval_of_a_mean_is_that_of_theory():
    values = answers(0, 0.3)
    units = mean_units(IDS, values)
    low, high = bootstrap.interval(bootstrap.replicates(units, "task"))
    error = 1.96 * values.std() / np.sqrt(400)
    assert bootstrap.point(units) == values.mean()
    np.testing.assert_allclose(
        [low, high], [values.mean() - error, values.mean() + error], atol=4e-3
    )


def test_the_interval_of_a_ratio_is_that_of_theory():
    """By the delta method, on numbers of objects that are mentioned and hallucinated."""
    rng = np.random.default_rng(1)
    below = rng.integers(1, 9, 400)
    above = rng.binomial(below, 0.2)
    units = ratio_units(IDS, above, below)
    score = bootstrap.point(units)
    assert score == above.sum() / below.sum()
    error = 1.96 * (above - score * below).std() / below.mean() / np.sqrt(400)
    low, high = bootstrap.interval(bootstrap.replicates(units, "task"))
    np.testing.assert_allclose([low, high], [score - error, score + error], atol=3e-3)


def test_models_have_the_same_questions_in_each_draw():
    """Two models that differ on 5 % of the questions; the others are hard for both or neither."""
    first = answers(0, 0.5)
    second = first.copy()
    second[::20] = 1 - second[::20]
    drawn = [bootstrap.replicates(mean_units(IDS, each), "task") for each in (first, second)]
    low, high = bootstrap.interval(drawn[1] - drawn[0])
    changes = second - first
    assert high - low == pytest.approx(2 * 1.96 * changes.std() / np.sqrt(400), rel=0.1)
    unpaired = drawn[1] - bootstrap.replicates(mean_units(IDS, first), "another task")
    assert np.subtract(*bootstrap.interval(unpaired)) < 2 * (low - high)
    np.testing.assert_array_equal(drawn[0], bootstrap.replicates(mean_units(IDS, first), "task"))


def test_strata_keep_their_sizes():
    """A score whose strata are constant does not vary, however different they are."""
    strata = np.repeat([0, 1, 2], [5, 1, 30])
    values = np.array([200.0, 50.0, 100.0])[strata]
    units = Units(ids=tuple(IDS[:36]), strata=strata, numerators=values, denominators=np.ones(36))
    assert set(bootstrap.replicates(units, "mme")) == {350.0}


def test_a_draw_with_nothing_to_count_is_zero():
    units = ratio_units(["a", "b"], [0, 1], [0, 1])
    assert set(bootstrap.replicates(units, "task")) == {0.0, 1.0}
