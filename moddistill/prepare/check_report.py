"""The tables of a check as text and as one self-contained HTML page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from moddistill.prepare.sections import Section
from moddistill.reports.charts import histogram
from moddistill.reports.table import format_table, html_table
from moddistill.reports.template import STYLE
from moddistill.storage.text_file import writing

_WIDTH = 40  # characters of the longest bar
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><h1>{title}</h1>
{sections}</body></html>
"""
_SECTION = """<section><h2>{title}</h2>
<p class="note">{note}</p>
<div class="card scroll">{table}{bars}{items}</div></section>
"""


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
    page = _PAGE.format(title=escape(title), style=STYLE, sections="".join(map(_html, sections)))
    with writing(path):
        path.write_text(page, encoding="utf-8")


def _html(section: Section) -> str:
    items = "".join(f"<li>{escape(item)}</li>" for item in section.items)
    return _SECTION.format(
        title=escape(section.title),
        note=escape(section.note),
        table=html_table(section.columns, section.rows),
        bars=histogram(section.bars) if section.bars else "",
        items=f'<ul class="items">{items}</ul>' if items else "",
    )
