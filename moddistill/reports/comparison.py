"""A suite's comparison (`evals.suite.compare`) as a table for terminals and as a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moddistill.evals.bootstrap import Estimate
from moddistill.evals.task import Column
from moddistill.reports import template
from moddistill.reports.charts import interval_bar
from moddistill.reports.table import UNKNOWN, format_table, html_table
from moddistill.reports.template import Html, join, part
from moddistill.storage.text_file import replace_text

_METHOD = (
    "Intervals hold {confidence:.0%} of {resamples:,} bootstrap draws of the questions "
    "(percentiles, seed {seed}); those of differences have the same questions for both models."
)
_SIGNS = "↓ lower is better; * no source that could be read confirms this number"


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Returns the tables of scores and differences in Markdown, with notes below."""
    tables = [format_table(*_scores(comparison))]
    if len(comparison["models"]) > 1:
        tables.append(format_table(*_differences(comparison)))
    notes = [_METHOD.format(**comparison["bootstrap"]), _SIGNS, *_notes(comparison)]
    return "\n\n".join([*tables, "\n".join(notes)])


def write_comparison(path: Path, comparison: Mapping[str, Any]) -> None:
    """Writes the page."""
    method = _METHOD.format(**comparison["bootstrap"])
    title = f"{comparison['suite']}: {', '.join(comparison['models'])}"
    sections = [
        template.section("Scores", method, _card("Scores", html_table(*_scores(comparison))))
    ]
    if len(comparison["models"]) > 1:
        first = next(iter(comparison["models"]))
        note = "The line is at zero; all bars have one scale."
        card = _card("Differences", _drawn_differences(comparison))
        sections.append(template.section(f"Differences from {first}", note, card))
    sections.append(template.section("Notes", _SIGNS, _items(_notes(comparison))))
    sources = [
        f"{each['model']} ({each['from']}): {each['source']}" for each in comparison["published"]
    ]
    sections.append(template.section("Sources", comparison["source"], _items(sources)))
    replace_text(path, template.page(title, join(sections)))


def _card(label: str, table: Html) -> Html:
    return part("table_card", label=label, table=table)


def _items(texts: list[str]) -> Html:
    return part("items", items=join(part("item", text=text) for text in texts))


def _scores(comparison: Mapping[str, Any]) -> tuple[list[Column], list[dict[str, str]]]:
    """The scores of models with intervals, and published scores."""
    models = list(comparison["models"])
    published = [each["model"] for each in comparison["published"]]
    columns = [Column(name, name, "") for name in ("Benchmark", *models, *published)]
    rows = []
    for row in comparison["rows"]:
        cells = {"Benchmark": row["name"] + " ↓" * row.get("lower_is_better", False)}
        cells |= {model: _cell(row["scores"][model]) for model in models}
        for name in published:
            found = row["published"].get(name)
            star = "" if found is None or found["confirmed"] else "*"
            cells[name] = f"{found['score']:.1f}{star}" if found else UNKNOWN
        rows.append(cells)
    return columns, rows


def _differences(comparison: Mapping[str, Any]) -> tuple[list[Column], list[dict[str, str]]]:
    first, *others = comparison["models"]
    titles = {model: f"{model} - {first}" for model in others}
    columns = [Column("Benchmark", "Benchmark", "")]
    columns += [Column(model, title, "") for model, title in titles.items()]
    rows = [
        {"Benchmark": row["name"]}
        | {model: _cell(row["scores"][model].get("difference", {}), "+") for model in others}
        for row in comparison["rows"]
    ]
    return columns, rows


def _drawn_differences(comparison: Mapping[str, Any]) -> Html:
    """The same table with a bar for each difference."""
    columns, rows = _differences(comparison)
    found = [
        row["scores"][column.key].get("difference")
        for row in comparison["rows"]
        for column in columns[1:]
    ]
    ends = [abs(each[end]) for each in found if each for end in ("low", "high")]
    head = join(part("head_cell", text=column.title) for column in columns)
    bars, body = iter(found), []
    for row in rows:
        cells = [part("table_cell", text=row["Benchmark"])]
        for column in columns[1:]:
            each, text = next(bars), row[column.key]
            bar = interval_bar(Estimate(**each), max(ends), text) if each else Html("")
            cells.append(part("drawn_cell", text=text, bar=bar))
        body.append(part("table_row", cells=join(cells)))
    return part("table", head=head, body=join(body))


def _cell(cell: Mapping[str, Any], sign: str = "") -> str:
    if "score" not in cell:
        return UNKNOWN
    score = f"{cell['score']:{sign}.1f}"
    return (
        f"{score} [{cell['low']:{sign}.1f}, {cell['high']:{sign}.1f}]" if "low" in cell else score
    )


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    """What benchmarks are, and what is missing of a model and why, each text once."""
    models = list(comparison["models"])
    notes = []
    for row in comparison["rows"]:
        if row.get("note"):
            notes.append(f"{row['name']}: {row['note']}")
        by_text: dict[str, list[str]] = {}
        for model in models:
            if note := row["scores"][model].get("note"):
                by_text.setdefault(note, []).append(model)
        notes += [f"{row['name']}, {', '.join(which)}: {note}" for note, which in by_text.items()]
    return notes
