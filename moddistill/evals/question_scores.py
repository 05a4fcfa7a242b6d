"""Units of a benchmark's score, for the bootstrap, from what lmms-eval logs of each question.

lmms-eval logs for each question and metric what the task's `process_results` gives: a number, or an
object that the task's own aggregation reads. `FORMS` has a reader for each kind of object; a suite
names it. Whether a reader and the aggregation agree is checked by their scores.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moddistill.evals.bootstrap import Units, mean_units, ratio_units

_CIRCULAR = 1_000_000  # MMBench adds multiples of it to the index of a question for other orders
_LETTER = re.compile(r"\(?([A-E])(?:[.,:)\s]|$)")


def units_of(form: str, ids: Sequence[str], values: Sequence[Any]) -> Units | None:
    """Returns the units of a metric; None if its values have another form, or there are none.

    Args:
      form: a key of `FORMS`.
      ids: of the questions.
      values: of the metric, in the same order.
    """
    if not values:
        return None
    try:
        return FORMS[form](ids, values)
    except (KeyError, TypeError, ValueError):  # a version of the task that logs something else
        return None


def _mean(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """Numbers, or objects with a `score`."""
    numbers = [each["score"] if isinstance(each, Mapping) else each for each in values]
    return mean_units(ids, numbers)


def _ratio(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """Objects with a `numerator` and a `denominator`, whose sums are divided."""
    above = [each["numerator"] for each in values]
    return ratio_units(ids, above, [each["denominator"] for each in values])


def _f1(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """F1 of "yes": 2 true positives / (predicted positives + actual positives)."""
    predicted = np.array([each["prediction"] == "yes" for each in values], float)
    actual = np.array([each["ground_truth"] == "yes" for each in values], float)
    return ratio_units(ids, 2 * predicted * actual, predicted + actual)


def _mme(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """Images with two questions: points for each right answer, and for both; by category."""
    del ids
    images = defaultdict(list)
    for each in values:
        images[each["category"], each["question_id"]].append(each["score"])
    names = sorted(images)
    categories = sorted({category for category, _ in names})
    points = [100 * (np.mean(images[name]) + (min(images[name]) == 1)) for name in names]
    return Units(
        ids=tuple(f"{category}/{image}" for category, image in names),
        strata=np.array([categories.index(category) for category, _ in names]),
        numerators=np.array(points, float),
        denominators=np.ones(len(names)),
    )


def _mmbench(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """Questions, each right if all orders of its options are answered by the right letter."""
    del ids
    hits = defaultdict(list)
    for each in values:
        letter = _LETTER.match(each["prediction"].strip())
        hits[int(each["index"]) % _CIRCULAR].append(bool(letter) and letter[1] == each["answer"])
    return mean_units([str(index) for index in hits], [100.0 * all(hits[index]) for index in hits])


FORMS: dict[str, Callable[[Sequence[str], Sequence[Any]], Units]] = {
    "mean": _mean,
    "ratio": _ratio,
    "f1": _f1,
    "mme": _mme,
    "mmbench": _mmbench,
}
