"""Scores of models with bootstrap intervals, and their paired differences from the teacher."""

from collections import Counter
from collections.abc import Sequence

from moddistill.errors import not_one_of
from moddistill.evals import bootstrap
from moddistill.evals.bootstrap import Estimate, mean_units
from moddistill.reports.charts import interval_bar
from moddistill.reports.table import UNKNOWN
from moddistill.reports.template import Html, join, part
from moddistill.reports.workdirs import Content, Results

CONFIDENCE = f"{bootstrap.CONFIDENCE:.0%}"


def find_teacher(content: Content, name: str = "") -> str:
    """Returns the model that others are compared with: `name`, or the teacher of most runs.

    If no run names a teacher that has results, it is the first model.

    Raises:
      UserError: there is no such model.
    """
    models = content.models
    if name and name not in models:
        raise not_one_of("--teacher", name, models)
    if name or not models:
        return name
    # A run names the folder of its teacher's model, such as runs/demo/teacher/model.
    taught = Counter(
        model for run in content.runs for model in models if f"/{model}/model" in f"/{run.teacher}"
    )
    return taught.most_common(1)[0][0] if taught else models[0]


def differences_table(task: Sequence[Results], teacher: str) -> Html:
    """Returns a row for each model with results on one task; the teacher is the first.

    The score is the mean of the questions' scores. Differences are over questions that both
    answered.
    """
    by_model = {each.model: scores for each in task if (scores := _scores(each))}
    order = [teacher] * (teacher in by_model) + [name for name in by_model if name != teacher]
    found = {name: _difference(by_model, name, teacher, task[0].task) for name in order}
    ends = [abs(end) for each in found.values() if each for end in (each.low, each.high)]
    largest = max(ends, default=0.0)
    rows = [_row(name, by_model[name], found[name], largest, task[0].task) for name in order]
    return part("difference_table", confidence=CONFIDENCE, rows=join(rows))


def _scores(results: Results) -> dict[str, float]:
    """The score of each question by its id; empty if they have none."""
    scores = {str(row["id"]): results.score(row) for row in results.rows}
    return {name: score for name, score in scores.items() if score is not None}


def _estimate(scores: dict[str, float], task: str) -> Estimate:
    units = mean_units(list(scores), list(scores.values()))
    return Estimate(bootstrap.point(units), *bootstrap.interval(bootstrap.replicates(units, task)))


def _difference(
    by_model: dict[str, dict[str, float]], name: str, teacher: str, task: str
) -> Estimate | None:
    """The mean difference over shared questions; None of the teacher, or without any."""
    if name == teacher or teacher not in by_model:  # whose questions may have no scores
        return None
    ours, its = by_model[name], by_model[teacher]
    # The mean of differences is the difference of means, so that pairs are units by themselves.
    pairs = {key: ours[key] - its[key] for key in its if key in ours}
    return _estimate(pairs, task) if pairs else None


def _row(
    name: str, scores: dict[str, float], difference: Estimate | None, largest: float, task: str
) -> Html:
    own = _estimate(scores, task)
    shown, between, plot = UNKNOWN, UNKNOWN, Html("")
    if difference is not None:
        shown = f"{difference.score:+.3f}"
        between = f"{difference.low:+.3f} to {difference.high:+.3f}"
        plot = interval_bar(difference, largest, f"{name}: {shown}, {between}")
    return part(
        "difference_row",
        model=name,
        questions=f"{len(scores):,}",
        score=f"{own.score:.3f}",
        interval=f"{own.low:.3f} to {own.high:.3f}",
        difference=shown,
        between=between,
        plot=plot,
    )
