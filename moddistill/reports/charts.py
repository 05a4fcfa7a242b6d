"""Charts of the report as HTML fragments: curves in inline SVG, bars in plain elements.

Curves stretch with the page; labels are HTML next to them, so that text never scales.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moddistill.errors import UserError

# Keys of a metrics row that are text of the card, not curves.
NOT_DRAWN = ("step", "tokens_per_second", "seconds")
WIDTH, HEIGHT = 300, 100  # of a curve, in SVG units

CURVE = """<figure class="{size}">
<figcaption><b>{name}</b><span>{last}</span></figcaption>
<div class="plot">
<div class="ends up"><span>{high}</span><span>{low}</span></div>
<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{alt}">
<path class="rule" d="{rules}"/><path class="line" d="{line}"/><path class="dot" d="{dot}"/></svg>
<i></i><div class="ends"><span>{first_step}</span><span>step {last_step}</span></div>
</div></figure>"""

STAGE = """<article class="card"><h3>{name}</h3><p class="note">{note}</p>
<div class="stage">{loss}<div class="parts">{parts}</div></div></article>"""

LOAD = """<article class="card"><h3>Layer {layer}</h3><div class="load">
{rows}</div></article>"""

LOAD_ROW = """<span class="expert">expert {expert}</span>
<div class="track" style="--even:{even:.2%}">
<div class="bar image" style="width:{image_width:.2%}"></div>
<div class="bar text" style="width:{text_width:.2%}"></div></div>
<span class="share"><span>{image:.0%}</span><span>{text:.0%}</span></span>"""

HISTOGRAM = """<div class="load bars">
{rows}</div>"""

HISTOGRAM_ROW = """<span class="expert">{label}</span>
<div class="track"><div class="bar image" style="width:{width:.2%}"></div></div>
<span class="share">{count:,}</span>"""


def number(value: float | int) -> str:
    """Returns a number with three significant digits, without padding zeros."""
    digits, _, exponent = f"{value:.3g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def curve(name: str, points: Sequence[tuple[int, float | int]], size: str = "small") -> str:
    """Returns a line chart of (step, value); `size` is "large" or "small".

    Raises:
      UserError: if there is no point, or a value is not finite.
    """
    if not points:
        raise UserError(f"curve {name!r}: expected at least one point, got none")
    for step, value in points:
        if not math.isfinite(value):
            raise UserError(f"curve {name!r}: expected a finite number at step {step}, got {value}")
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)

    def svg_point(step: int, value: float | int) -> str:
        # SVG's y axis points down; a curve without range is drawn in the middle.
        x = (step - steps[0]) / ((steps[-1] - steps[0]) or 1) * WIDTH
        y = HEIGHT - (value - low) / (high - low) * HEIGHT if high > low else HEIGHT / 2
        return f"{x:.1f} {y:.1f}"

    # The dot is a path of length zero with round caps: unlike a circle, it is not stretched with
    # the axes.
    return CURVE.format(
        size=size,
        name=escape(name),
        last=number(values[-1]),
        low=number(low) if high > low else "",
        high=number(high),
        width=WIDTH,
        height=HEIGHT,
        alt=escape(f"{name} from {number(values[0])} to {number(values[-1])}"),
        rules="".join(f"M0 {y}H{WIDTH}" for y in (0, HEIGHT / 2, HEIGHT)),
        line="M" + "L".join(svg_point(*point) for point in points),
        dot=f"M{svg_point(*points[-1])}h0",
        first_step=f"{steps[0]:,}",
        last_step=f"{steps[-1]:,}",
    )


def stage_card(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the curves of one stage: a large one of `loss`, small ones of all other metrics.

    Raises:
      UserError: if no row has a loss, or a value is not finite.
    """
    names = list(dict.fromkeys(key for row in rows for key in row if key not in NOT_DRAWN))
    if "loss" not in names:
        raise UserError(
            f"stage {name!r}: expected 'loss' in a row of metrics, got {len(rows)} rows"
        )
    curves = {key: [(row["step"], row[key]) for row in rows if key in row] for key in names}
    loss = curve("loss", curves.pop("loss"), "large")
    parts = "".join(curve(key, points) for key, points in curves.items())
    return STAGE.format(name=escape(name), note=_throughput(rows), loss=loss, parts=parts)


def _throughput(rows: Sequence[Mapping[str, Any]]) -> str:
    words = [f"{rows[-1]['step']:,} steps"]
    if "seconds" in rows[-1]:
        words.append(f"{rows[-1]['seconds']:,.0f} s")
    # The median, since the first interval includes compilation.
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    if speeds:
        words.append(f"{speeds[len(speeds) // 2]:,.0f} tokens/s")
    return " · ".join(words)


def load_card(load: Mapping[str, Any]) -> str:
    """Returns bars of each expert's share of a layer's image and text tokens.

    Args:
      load: `layer`, and for `image` and `text` one number per expert, in any unit.

    Raises:
      UserError: if the two differ in length, a number is negative, or a sum is not positive.
    """
    shares = {kind: _shares(load, kind) for kind in ("image", "text")}
    experts = len(shares["image"])
    if len(shares["text"]) != experts:
        raise UserError(
            f"layer {load['layer']}: expected as many text loads as image loads, {experts}, got"
            f" {len(shares['text'])}"
        )
    # A full row is twice the even share, so that layers compare; a larger share stretches it.
    full = max(2 / experts, *shares["image"], *shares["text"])
    rows = [
        LOAD_ROW.format(
            expert=expert,
            even=1 / experts / full,
            image=image,
            text=text,
            image_width=image / full,
            text_width=text / full,
        )
        for expert, (image, text) in enumerate(zip(*shares.values(), strict=True))
    ]
    return LOAD.format(layer=load["layer"], rows="\n".join(rows))


def _shares(load: Mapping[str, Any], kind: str) -> list[float]:
    values = load[kind]
    total = sum(values)
    if not total > 0 or min(values) < 0:
        raise UserError(
            f"layer {load['layer']}: expected {kind} loads >= 0 with a sum > 0, got {values}"
        )
    return [value / total for value in values]


def histogram(bars: Sequence[tuple[str, int]]) -> str:
    """Returns a bar for each (label, count); the longest one fills its row."""
    largest = max(1, *(count for _, count in bars))
    rows = [
        HISTOGRAM_ROW.format(label=escape(label), width=count / largest, count=count)
        for label, count in bars
    ]
    return HISTOGRAM.format(rows="\n".join(rows))
