"""HTML and CSS of the report page."""

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
.items { margin: .75rem 0 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
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
.bars .track::after { display: none; }
.bar { height: 9px; border-radius: 0 2px 2px 0; } .bar + .bar { margin-top: 2px; }
.share { display: grid; text-align: right; line-height: 1.15; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>
<body><h1>{title}</h1>
<section><h2>Results</h2>
<p class="note">{notes}Parameters are those stored, and those that one token uses.</p>
<div class="card scroll">{table}</div></section>
<section><h2>Training</h2>
<p class="note">Each curve spans its own lowest and highest value; its last value is at the top
right.</p>
<div class="grid" style="--least:100%">{stages}</div></section>
{tasks}</body></html>
"""

ANSWERS = """<section><h2>Answers: {title}</h2>
<p class="note">✓ counts as correct, ✗ does not.</p>
<div class="grid" style="--least:21rem">{examples}</div></section>
"""

LOADS = """<section><h2>Expert load: {title}</h2>
<p class="note"><i class="key image"></i>share of the image tokens
&nbsp; <i class="key text"></i>share of the text tokens &nbsp; ┆ even share.
Each kind adds up to 100 % over the experts of a layer.</p>
<div class="grid" style="--least:18rem">{loads}</div></section>
"""

EXAMPLE = """<article class="card example"><div>{images}</div>
<div><h3>{question}</h3><dl><dt>answer</dt><dd>{answers}</dd>
{predictions}</dl></div></article>"""

IMAGE = """<img alt="" src="data:image/png;base64,{data}">"""

PREDICTION = """<dt>{model}</dt><dd class="{kind}">
<span role="img" aria-label="{kind}">{mark}</span> {text}</dd>
"""
