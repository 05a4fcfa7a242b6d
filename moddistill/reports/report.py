"""The report of a recipe: one HTML page that needs nothing else, and its table as text.

`write_report` draws what the demo and any run of the whole recipe ends with: a table of models, the
curves of every stage, pictures with two models' answers, and the load of the experts.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from moddistill.errors import UserError
from moddistill.reports.charts import load_card, stage_card

COLUMNS = {
    "model": "Model",
    "accuracy": "Accuracy",
    "yes_no": "Yes/no",
    "other": "Other",
    "false_yes": "False yes",
    "parameters": "Parameters",
    "activated": "Activated",
    "seconds": "Seconds",
}
LARGEST_PICTURE = 256  # pixels of the longer side

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2330; --soft: #5d6778;
  --line: #dfe3ea; --accent: #2563c9; --second: #a3acba; --good: #14733f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1b2029; --ink: #e6e9ef;
  --soft: #9aa4b5; --line: #303846; --accent: #7aa9f7; --second: #677286; --good: #6cc792;
  --bad: #f28b82; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0; }
.note { color: var(--soft); max-width: 44rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem; min-width: 0; }
.grid { display: grid; gap: 1rem; margin-top: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); }
.scroll { overflow-x: auto; padding: .25rem 1rem; margin-top: .75rem; }
table { border-collapse: collapse; width: 100%; white-space: nowrap; }
th, td { padding: .5rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 500; }
tr:last-child td { border-bottom: 0; }
figure { margin: .75rem 0 0; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .75rem; }
figcaption b { font-weight: 600; overflow-wrap: anywhere; }
figcaption span, .ends, .expert, .share { color: var(--soft); font-size: .8rem; }
.stage { display: grid; gap: 0 2rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 50rem) { .stage { grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); } }
.parts { display: grid; gap: 0 1.25rem; align-content: start;
  grid-template-columns: repeat(auto-fill, minmax(min(10.5rem, 45%), 1fr)); }
.plot { display: grid; grid-template-columns: auto 1fr; gap: .2rem .5rem; margin-top: .25rem; }
.ends { display: flex; justify-content: space-between; line-height: 1; }
.up { flex-direction: column; text-align: right; min-width: 4em;
  white-space: nowrap; }
svg { width: 100%; height: 3.25rem; overflow: visible; display: block; }
.large svg { height: 9rem; }
svg path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.rule { stroke: var(--line); }
.line { stroke: var(--accent); stroke-width: 1.5; }
.dot { stroke: var(--accent); stroke-width: 6; stroke-linecap: round; }
.example { display: flex; gap: .9rem; }
.example img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated;
  border-radius: 4px; flex: none; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0 .75rem; margin: .35rem 0 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.right { color: var(--good); } .wrong { color: var(--bad); }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 0; }
.image { background: var(--accent); } .text { background: var(--second); }
.load { display: grid; grid-template-columns: auto 1fr auto; gap: .6rem .75rem; margin-top: .75rem;
  align-items: center; }
.track { position: relative; padding: 2px 0; }
.track::after { content: ""; position: absolute; top: -4px; bottom: -4px; left: var(--even);
  border-left: 1.5px dashed var(--ink); }
.bar { height: 9px; border-radius: 0 2px 2px 0; } .bar + .bar { margin-top: 2px; }
.share { display: grid; text-align: right; line-height: 1.15; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><h1>{title}</h1>
<section><h2>Results</h2>
<p class="note">Shares of questions: answered as published, and answered “yes” where “no” is true.
Parameters are those stored, and those that one token uses.</p>
<div class="card scroll">{table}</div></section>
<section><h2>Training</h2>
<p class="note">Each curve spans its own lowest and highest value; its last value stands above.</p>
<div class="grid" style="--least:100%">{stages}</div></section>
<section><h2>Answers</h2>
<p class="note">✓ equals the published answer, ✗ does not.</p>
<div class="grid" style="--least:21rem">{examples}</div></section>
<section><h2>Load of the experts</h2>
<p class="note"><i class="key image"></i>share of the image tokens
&nbsp; <i class="key text"></i>share of the text tokens &nbsp; ┆ even share.
Each kind adds up to 100 % over the experts of a layer.</p>
<div class="grid" style="--least:18rem">{loads}</div></section>
</body></html>
"""

EXAMPLE = """<article class="card example"><img alt="" src="data:image/png;base64,{picture}">
<div><h3>{question}</h3><dl><dt>published</dt><dd>{answer}</dd>
<dt>teacher</dt>{teacher}<dt>student</dt>{student}</dl></div></article>"""


def write_report(
    path: str | Path,
    *,
    title: str,
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
    table: Sequence[Mapping[str, Any]],
    examples: Sequence[Mapping[str, Any]],
    loads: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the page.

    Args:
      path: the HTML file.
      title: heading of the page.
      stages: rows of `metrics.jsonl` (`step`, `loss`, named parts, `tokens_per_second`, `seconds`
        since the start) by the name of the stage.
      table: a row for each model with the keys of `COLUMNS`; rates are shares from 0 to 1.
      examples: `image` (a file), `question`, `answer`, and what `teacher` and `student` said.
      loads: `layer`, and for its `image` and `text` tokens one number an expert.

    Raises:
      UserError: a row of the table lacks a column or has an unknown one, an image is missing, or
        something cannot be drawn (see `charts`).
    """
    page = PAGE.format(
        title=escape(title),
        style=STYLE,
        table=_html_table(table),
        stages="".join(stage_card(name, rows) for name, rows in stages.items()),
        examples="".join(_example(example) for example in examples),
        loads="".join(load_card(load) for load in loads),
    )
    Path(path).write_text(page, encoding="utf-8")


def format_table(table: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown, aligned so that a terminal shows it well too.

    Raises:
      UserError: a row lacks a column or has an unknown one.
    """
    rows = [tuple(COLUMNS.values()), *map(_cells, table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rules = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    lines = []
    for first, *rest in [rows[0], rules, *rows[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if set(row) != set(COLUMNS):
        raise UserError(f"table row {dict(row)}: expected exactly the keys {', '.join(COLUMNS)}")
    rates = [f"{row[key]:.3f}" for key in ("accuracy", "yes_no", "other", "false_yes")]
    counts = [f"{row[key]:,}" for key in ("parameters", "activated")]
    return (str(row["model"]), *rates, *counts, f"{row['seconds']:,.0f}")


def _html_table(table: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS.values())
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in _cells(row)) for row in table]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _example(example: Mapping[str, Any]) -> str:
    return EXAMPLE.format(
        picture=_picture(Path(example["image"])),
        question=escape(example["question"]),
        answer=escape(example["answer"]),
        teacher=_said(example["teacher"], example["answer"]),
        student=_said(example["student"], example["answer"]),
    )


def _said(text: str, answer: str) -> str:
    right = text.strip().lower() == answer.strip().lower()
    mark, kind = ("✓", "right") if right else ("✗", "wrong")
    return (
        f'<dd class="{kind}"><span role="img" aria-label="{kind}">{mark}</span> {escape(text)}</dd>'
    )


def _picture(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"image {path} of an example does not exist, expected a picture file")
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
