"""Results tables, as Markdown and as HTML."""

from collections.abc import Mapping, Sequence
from typing import Any

from moddistill.errors import UserError
from moddistill.evals.task import Column
from moddistill.reports.template import Html, join, part

UNKNOWN = "–"  # a cell whose value is None


def format_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table, aligned for terminals.

    Raises:
      UserError: if the keys of a row are not those of the columns.
    """
    cells = [tuple(column.title for column in columns), *(_cells(columns, row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # Markdown aligns a column to the right if its rule ends with a colon.
    rules = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    lines = []
    for first, *rest in [cells[0], rules, *cells[1:]]:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *padded])} |")
    return "\n".join(lines)


def html_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> Html:
    """Returns the same table as an HTML element.

    Raises:
      UserError: if the keys of a row are not those of the columns.
    """
    head = join(part("head_cell", text=column.title) for column in columns)
    body = join(
        part(
            "table_row", cells=join(part("table_cell", text=cell) for cell in _cells(columns, row))
        )
        for row in rows
    )
    return part("table", head=head, body=body)


def _cells(columns: Sequence[Column], row: Mapping[str, Any]) -> tuple[str, ...]:
    keys = [column.key for column in columns]
    if set(row) != set(keys):
        raise UserError(f"table row: expected exactly the keys {', '.join(keys)}, got {dict(row)}")
    return tuple(
        UNKNOWN if row[column.key] is None else format(row[column.key], column.format)
        for column in columns
    )
