"""The report on runs and results: one HTML page without other files.

A table of models, differences from the teacher, the training curves of each run and, for each
task, questions with the answers of all models and the load of the experts.
"""

from pathlib import Path

from moddistill.errors import UserError
from moddistill.evals.bootstrap import RESAMPLES
from moddistill.evals.samples import EXAMPLES
from moddistill.reports import template
from moddistill.reports.charts import stage_card
from moddistill.reports.differences import differences_table, find_teacher
from moddistill.reports.examples import answers
from moddistill.reports.results_table import results_table
from moddistill.reports.specialisation import load_cards, specialisation_table
from moddistill.reports.table import html_table
from moddistill.reports.template import Html, join, part
from moddistill.reports.workdirs import Content
from moddistill.storage.text_file import replace_text

_Section = tuple[str, str | Html, Html]


def write_report(path: Path, content: Content, title: str, teacher: str = "") -> None:
    """Writes the page. What cannot be drawn is added to the problems, which the page lists.

    Args:
      path: the HTML file.
      title: heading of the page.
      teacher: the model that others are compared with; by default that which taught most runs.

    Raises:
      UserError: no model has the name of the teacher.
    """
    teacher = find_teacher(content, teacher)
    sections = [
        _results(content),
        *_intervals(content, teacher),
        *_training(content),
        *_answers(content),
        *_loads(content),
    ]
    if content.problems:
        items = join(part("item", text=text) for text in content.problems)
        note = "The rest of the page is complete."
        sections.insert(0, ("Not read", note, part("items", items=items)))
    links = join(part("link", id=template.anchor(name), title=name) for name, *_ in sections)
    body = [part("navigation", links=links), *(template.section(*each) for each in sections)]
    replace_text(path, template.page(title, join(body)))


def _table_card(label: str, table: Html) -> Html:
    return part("table_card", label=label, table=table)


def _results(content: Content) -> _Section:
    definitions = {name: found[0].definition for name, found in content.tasks.items()}
    notes = dict.fromkeys(each.note for each in definitions.values() if each and each.note)
    sizes = "Parameters are those stored, and those that one token uses."
    table = html_table(*results_table(content))
    return "Results", " ".join([*notes, sizes]), _table_card("Results", table)


def _intervals(content: Content, teacher: str) -> list[_Section]:
    note = (
        f"The mean score of the questions. Intervals are from {RESAMPLES:,} bootstrap draws of the "
        "questions; those of differences are paired: each draw has the same questions for both."
    )
    sections: list[_Section] = []
    others = []
    for name, found in content.tasks.items():
        models = [
            each.model for each in found if any(each.score(row) is not None for row in each.rows)
        ]
        if models:
            reference = teacher if teacher in models else models[0]
            title = f"{name} against {reference}" if len(models) > 1 else f"{name}: interval"
            card = _table_card(title, differences_table(found, reference))
            sections.append((title, "" if sections else note, card))
        elif any(each.rows for each in found):
            others.append(name)
    if others:
        note = (
            f"The samples of {', '.join(others)} have no score for each question. For benchmarks "
            "of LLaVA-MoD, `moddistill.evaluate --suite llava-mod --compare` gives intervals and "
            "paired differences."
        )
        sections.append(("Tasks without intervals", note, Html("")))
    return sections


def _training(content: Content) -> list[_Section]:
    cards = []
    for run in content.runs:
        try:
            cards.append(stage_card(run.name, run.rows))
        except UserError as error:
            content.problems.append(f"{run.name}: {error}")
    if not cards:
        return []
    note = "Each curve spans its own lowest and highest value; its last value is at the top right."
    return [("Training", note, part("grid", least="100%", cards=join(cards)))]


def _answers(content: Content) -> list[_Section]:
    note = (
        f"Up to {EXAMPLES} questions at even distances, and as many on which models differ. ✓ is "
        "right, ✗ is wrong; a number is a partial score."
    )
    answered = {
        name: [each for each in found if each.rows] for name, found in content.tasks.items()
    }
    return [
        (f"Answers: {name}", note, answers(found, content.problems))
        for name, found in answered.items()
        if found
    ]


def _loads(content: Content) -> list[_Section]:
    sections = []
    for name, found in content.tasks.items():
        cards = load_cards(found, content.problems)
        if cards:
            note = join([part("load_key"), part("load_note")])
            grid = part("grid", least="18rem", cards=join(cards))
            sections.append((f"Expert load: {name}", note, grid))
    if sections:
        table = html_table(*specialisation_table(content))
        note = (
            "How different two loads of a layer are, from 0 (the same) to 1 (no expert in common): "
            "half the sum of absolute differences of shares. Image against text tokens of a task; "
            "all tokens of a task against those of the other tasks."
        )
        sections.append(("Specialisation", note, _table_card("Specialisation", table)))
    return sections
