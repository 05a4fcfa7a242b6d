"""How a stack of dense and expert layers is cut into scanned segments.

A plan is a tuple of segments; a segment is a pattern of layer kinds (True for an expert layer) and
how often it repeats. Every layer of a segment's period has its own stacked parameters with the
repeats in front, so no layer carries parameters of a kind it is not. This file owns all stacking
and unstacking.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moddistill.errors import UserError, nearest

Placement = str | Sequence[int]
_LONGEST_PERIOD = 4


@dataclasses.dataclass(frozen=True)
class Segment:
    pattern: tuple[bool, ...]
    repeats: int


Plan = tuple[Segment, ...]


def moe_layers(placement: Placement, num_layers: int) -> tuple[int, ...]:
    """Indices of the expert layers: every second one from 0, all, a half, or those listed.

    Raises:
      UserError: for an unknown placement, or indices that repeat or lie outside the stack.
    """
    half = num_layers // 2
    named = {
        "sparse": range(0, num_layers, 2),
        "dense": range(num_layers),
        "first_half": range(half),
        "second_half": range(half, num_layers),
    }
    if isinstance(placement, str) and placement not in named:
        raise UserError(
            f"moe.placement is {placement!r:.200}; accepted: {', '.join(named)}, or indices"
            + nearest(placement, named)
        )
    indices = tuple(named[placement] if isinstance(placement, str) else sorted(placement))
    inside = indices and indices[0] >= 0 and indices[-1] < num_layers
    if not inside or len(set(indices)) < len(indices):
        raise UserError(
            f"moe.placement is {placement!r:.200}, which is layers {indices!r:.200}; accepted: at "
            f"least one, different ones, from 0 to {num_layers - 1}"
        )
    return indices


def make_plan(kinds: Sequence[bool]) -> Plan:
    """The longest repeating segments that spell out `kinds`, one entry a layer."""
    segments = []
    position = 0
    while position < len(kinds):
        pattern, repeats = _longest_segment(tuple(kinds[position:]))
        segments.append(Segment(pattern, repeats))
        position += len(pattern) * repeats
    return tuple(segments)


def _longest_segment(kinds: tuple[bool, ...]) -> tuple[tuple[bool, ...], int]:
    best = (kinds[:1], 1)
    for period in range(1, min(_LONGEST_PERIOD, len(kinds)) + 1):
        pattern = kinds[:period]
        repeats = 1
        while kinds[repeats * period : (repeats + 1) * period] == pattern:
            repeats += 1
        enough = repeats > 1 or period == 1
        if enough and period * repeats > len(best[0]) * best[1]:
            best = (pattern, repeats)
    return best


def layer_index(plan: Plan, segment: int, block: int) -> tuple[int, int]:
    """The layer number of a segment's block in its first repeat, and the step between repeats."""
    before = sum(len(part.pattern) * part.repeats for part in plan[:segment])
    return before + block, len(plan[segment].pattern)


def unstack(params: dict[str, Any], plan: Plan) -> list[dict[str, Any]]:
    """One parameter tree a layer, in layer order, from `{segment_i: {block_j: stacked}}`."""
    layers = []
    for i, segment in enumerate(plan):
        blocks = [params[f"segment_{i}"][f"block_{j}"] for j in range(len(segment.pattern))]
        for repeat in range(segment.repeats):
            layers += [jax.tree.map(lambda x, r=repeat: x[r], block) for block in blocks]
    return layers


def stack(layers: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The inverse of `unstack`."""
    params: dict[str, Any] = {}
    position = 0
    for i, segment in enumerate(plan):
        period = len(segment.pattern)
        end = position + period * segment.repeats
        params[f"segment_{i}"] = {
            f"block_{j}": jax.tree.map(
                lambda *x: jnp.stack(x), *layers[position + j : end : period]
            )
            for j in range(period)
        }
        position = end
    return params
