"""Charts of reports as HTML: curves in inline SVG, bars and intervals in plain elements.

Curves stretch with the page; labels are HTML next to them, so that text never scales.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moddistill.errors import UserError
from moddistill.evals.bootstrap import Estimate
from moddistill.reports.template import Html, join, part

# Keys of a metrics row that are text of the card, not curves.
NOT_DRAWN = ("step", "seconds")
# The first curves of a stage after `loss`; all others follow as they are in the rows.
_FIRST = ("kd", "ce", "image_kd", "relation", "preference", "balance", "lr", "tokens_per_second")
WIDTH, HEIGHT = 300, 100  # of a curve, in SVG units


def number(value: float | int) -> str:
    """Returns a number with three significant digits, without padding zeros.

    Thousands are written out.
    """
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    digits, _, exponent = f"{value:.3g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def curve(name: str, points: Sequence[tuple[int, float | int]], size: str = "small") -> Html:
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
    return part(
        "curve",
        size=size,
        name=name,
        last=number(values[-1]),
        low=number(low) if high > low else "",
        high=number(high),
        width=WIDTH,
        height=HEIGHT,
        alt=f"{name} from {number(values[0])} to {number(values[-1])}",
        rules="".join(f"M0 {y}H{WIDTH}" for y in (0, HEIGHT / 2, HEIGHT)),
        line="M" + "L".join(svg_point(*point) for point in points),
        dot=f"M{svg_point(*points[-1])}h0",
        first_step=f"{steps[0]:,}",
        last_step=f"{steps[-1]:,}",
    )


def stage_card(name: str, rows: Sequence[Mapping[str, Any]]) -> Html:
    """Returns the curves of one stage: a large one of `loss`, small ones of all other metrics.

    Raises:
      UserError: if no row has a loss, or a value is not finite.
    """
    names = list(dict.fromkeys(key for row in rows for key in row if key not in NOT_DRAWN))
    if "loss" not in names:
        raise UserError(
            f"stage {name!r}: expected 'loss' in a row of metrics, got {len(rows)} rows"
        )
    names = [key for key in _FIRST if key in names] + [key for key in names if key not in _FIRST]
    curves = {key: [(row["step"], row[key]) for row in rows if key in row] for key in names}
    loss = curve("loss", curves.pop("loss"), "large")
    parts = join(curve(key, points) for key, points in curves.items())
    trained = [row for row in rows if "loss" in row]
    return part("stage", name=name, note=_throughput(trained), loss=loss, parts=parts)


def _throughput(rows: Sequence[Mapping[str, Any]]) -> str:
    words = [f"{rows[-1]['step']:,} steps"]
    if "seconds" in rows[-1]:
        words.append(f"{rows[-1]['seconds']:,.0f} s")
    # The median, since the first interval includes compilation.
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    if speeds:
        words.append(f"{speeds[len(speeds) // 2]:,.0f} tokens/s")
    return " · ".join(words)


def interval_bar(found: Estimate, largest: float, alt: str) -> Html:
    """Returns a score between the ends of its interval, on an axis from -largest to largest."""

    def place(value: float) -> float:
        return (value / largest + 1) / 2 if largest else 0.5

    return part(
        "interval",
        alt=alt,
        zero=f"{place(0.0):.2%}",
        low=f"{place(found.low):.2%}",
        width=f"{place(found.high) - place(found.low):.2%}",
        at=f"{place(found.score):.2%}",
    )


def histogram(bars: Sequence[tuple[str, int]]) -> Html:
    """Returns a bar for each (label, count); the longest one fills its row."""
    largest = max(1, *(count for _, count in bars))
    rows = join(
        part("histogram_row", label=label, width=f"{count / largest:.2%}", count=f"{count:,}")
        for label, count in bars
    )
    return part("histogram", rows=rows)
