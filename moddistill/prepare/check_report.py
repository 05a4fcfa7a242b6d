"""The tables of a check as text and as one self-contained HTML page."""

from collections.abc import Sequence
from pathlib import Path

from moddistill.prepare.sections import Section
from moddistill.reports import template
from moddistill.reports.charts import histogram
from moddistill.reports.table import format_table, html_table
from moddistill.reports.template import Html, join, page, part
from moddistill.storage.text_file import writing

_WIDTH = 40  # characters of the longest bar


def format_sections(sections: Sequence[Section]) -> str:
    """Returns the tables in Markdown, aligned for terminals."""
    return "\n\n".join(map(_text, sections))


def _text(section: Section) -> str:
    parts = [f"## {section.title}", section.note, format_table(section.columns, section.rows)]
    parts.append("\n".join(_text_bars(section.bars)))
    parts.append("\n".join(f"* {item}" for item in section.items))
    return "\n\n".join(part for part in parts if part)


def _text_bars(bars: Sequence[tuple[str, int]]) -> list[str]:
    label_width = max((len(label) for label, _ in bars), default=0)
    largest = max((count for _, count in bars), default=0) or 1
    return [
        f"    {label:>{label_width}} {'#' * -(-count * _WIDTH // largest):{_WIDTH}} {count:,}"
        for label, count in bars
    ]


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page."""
    with writing(path):
        path.write_text(page(title, join(map(_html, sections))), encoding="utf-8")


def _html(section: Section) -> Html:
    content = [html_table(section.columns, section.rows)]
    if section.bars:
        content.append(histogram(section.bars))
    if section.items:
        items = join(part("item", text=item) for item in section.items)
        content.append(part("items", items=items))
    card = part("table_card", label=section.title, table=join(content))
    return template.section(section.title, section.note, card)
