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
_NO_OPTION = (None, "", "nan", "none")
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
        units = FORMS[form](ids, values)
    except (AttributeError, KeyError, TypeError, ValueError):  # of another version, or damaged
        return None
    numbers = units.numerators
    return units if numbers.shape == (len(units.ids),) and np.isfinite(numbers).all() else None


def _mean(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """Numbers, or objects with a `score`."""
    numbers = [each["score"] if isinstance(each, Mapping) else each for each in values]
    return mean_units(ids, numbers)


def _f1(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """F1 of "yes": 2 true positives / (predicted positives + actual positives).

    As in lmms-eval, an answer with neither yes nor no is no false negative.
    """
    predicted = np.array([each["prediction"] == "yes" for each in values], float)
    actual = np.array(
        [each["ground_truth"] == "yes" and each["prediction"] in ("yes", "no") for each in values],
        float,
    )
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
    """Questions, each right if it is in all orders of its options."""
    del ids
    hits = defaultdict(list)
    for each in values:
        hits[int(each["index"]) % _CIRCULAR].append(_choice(each) == each["answer"])
    return mean_units([str(index) for index in hits], [100.0 * all(hits[index]) for index in hits])


def _choice(value: Mapping[str, Any]) -> str | None:
    """The letter that begins an answer, or that of the only option whose text is in it."""
    if letter := _LETTER.match(value["prediction"].strip()):
        return letter[1]
    answer = value["prediction"].lower()
    named = [x for x in "ABCD" if value[x] not in _NO_OPTION and str(value[x]).lower() in answer]
    return named[0] if len(named) == 1 else None


def _amber(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """The mean of 100 - CHAIR (of descriptions) and F1 of "no" (of questions): two strata."""
    described = [i for i, each in enumerate(values) if "objects" in each]
    asked = [i for i, each in enumerate(values) if "answer" in each]
    objects, hallucinated = (
        np.array([values[i][name] for i in described], float)
        for name in ("objects", "hallucinated")
    )
    denied, absent = (
        np.array([values[i][name] == "no" for i in asked], float) for name in ("answer", "truth")
    )
    return Units(
        ids=tuple(ids[i] for i in described + asked),
        strata=np.repeat([0, 1], [len(described), len(asked)]),
        numerators=50 * np.concatenate([objects - hallucinated, 2 * denied * absent]),
        denominators=np.concatenate([objects, denied + absent]),
    )


def _mmhal(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """Answers with a rating, of which those below 3 hallucinate."""
    rated = [
        (id_, each["rating"]) for id_, each in zip(ids, values, strict=True) if "rating" in each
    ]
    return mean_units([id_ for id_, _ in rated], [100.0 * (rating < 3) for _, rating in rated])


def _responses(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """Answers that mention an object, of which some hallucinate one."""
    hallucinating = [100.0 * (each["hallucinated"] > 0) for each in values]
    return ratio_units(ids, hallucinating, [each["mentions"] > 0 for each in values])


def _mentions(ids: Sequence[str], values: Sequence[Any]) -> Units:
    """Mentions of objects in answers, of which some are hallucinated."""
    return ratio_units(
        ids,
        [100.0 * each["hallucinated"] for each in values],
        [each["mentions"] for each in values],
    )


FORMS: dict[str, Callable[[Sequence[str], Sequence[Any]], Units]] = {
    "mean": _mean,
    "f1": _f1,
    "mme": _mme,
    "mmbench": _mmbench,
    "amber": _amber,
    "mmhal": _mmhal,
    "responses": _responses,
    "mentions": _mentions,
}
