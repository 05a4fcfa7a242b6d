"""The split of a stack of dense and expert layers into scanned segments.

A plan is a tuple of segments; a segment is a pattern of layer kinds (True for an expert layer) and
its number of repeats. Each layer of the pattern has its own stacked parameters, with the repeats as
first axis, so no layer carries parameters of the other kind. This module owns stacking and
unstacking.

    6 layers, experts in 0, 2 and 4: kinds 101010, one segment of pattern (True, False), 3 repeats
    6 layers, experts in 3, 4 and 5: kinds 000111, two segments of (False,) and (True,), 3 repeats
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moddistill.errors import UserError, did_you_mean, invalid

Placement = str | Sequence[int]
_LONGEST_PERIOD = 4


@dataclasses.dataclass(frozen=True)
class Segment:
    """A pattern of layer kinds (True for an expert layer) and its number of repeats."""

    pattern: tuple[bool, ...]
    repeats: int


Plan = tuple[Segment, ...]


def moe_layers(placement: Placement, num_layers: int) -> tuple[int, ...]:
    """Indices of the expert layers: every second one from 0, all, a half, or those listed.

    Raises:
      UserError: an unknown placement, or indices that repeat or are outside the stack.
    """
    half = num_layers // 2
    named = {
        "sparse": range(0, num_layers, 2),
        "every_layer": range(num_layers),
        "dense": range(num_layers),  # alias, as the reference spells it
        "first_half": range(half),
        "second_half": range(half, num_layers),
    }
    if isinstance(placement, str) and placement not in named:
        expected = f"one of {', '.join(map(repr, named))} or layer indices"
        error = invalid("moe.placement", placement, expected)
        raise UserError(f"{error}{did_you_mean(placement, named)}")
    indices = tuple(named[placement] if isinstance(placement, str) else sorted(placement))
    inside = indices and indices[0] >= 0 and indices[-1] < num_layers
    if not inside or len(set(indices)) < len(indices):
        expected = f"one or more distinct layers from 0 to {num_layers - 1}"
        error = invalid("moe.placement", placement, expected)
        raise UserError(f"{error}, which is layers {indices!r:.200}")
    return indices


def make_plan(kinds: Sequence[bool]) -> Plan:
    """The longest repeating segments that spell out `kinds`, one entry a layer."""
    segments = []
    position = 0
    while position < len(kinds):
        # Greedy from the front, so not always the fewest segments: 00101 becomes 00, 1, 0 and 1
        # rather than 0 and two repeats of 01.
        pattern, repeats = _longest_segment(tuple(kinds[position:]))
        segments.append(Segment(pattern, repeats))
        position += len(pattern) * repeats
    return tuple(segments)


def _longest_segment(kinds: tuple[bool, ...]) -> tuple[tuple[bool, ...], int]:
    # The longest segment wins; of equal ones that of the shorter period, which compiles less code.
    # A pattern of several layers must repeat, or the scan would only unroll them.
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


def separate(plan: Plan) -> Plan:
    """The plan of the same layers in segments of one layer."""
    kinds = [kind for segment in plan for kind in segment.pattern * segment.repeats]
    return tuple(Segment((kind,), 1) for kind in kinds)


def layer_index(plan: Plan, segment: int, block: int) -> tuple[int, int]:
    """The layer index of a segment's block in its first repeat, and the step between repeats."""
    before = sum(len(part.pattern) * part.repeats for part in plan[:segment])
    return before + block, len(plan[segment].pattern)


def unstack(params: dict[str, Any], plan: Plan) -> list[dict[str, Any]]:
    """One parameter tree a layer, in layer order, from `{segment_i: {block_j: stacked}}`."""
    layers = []
    for i, segment in enumerate(plan):
        blocks = [params[f"segment_{i}"][f"block_{j}"] for j in range(len(segment.pattern))]
        # Layer order is repeat-major: all blocks of one repeat, then those of the next.
        for repeat in range(segment.repeats):
            layers += [jax.tree.map(lambda x, r=repeat: x[r], block) for block in blocks]
    return layers


def separate_layers(params: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Parameters for `separate(plan)`, of which one array at a time exists twice.

    The arrays in `{segment_i: {block_j: stacked}}` are deleted.
    """
    layers: dict[str, Any] = {}
    for i, segment in enumerate(plan):
        for j in range(len(segment.pattern)):
            first, step = layer_index(plan, i, j)
            arrays, tree = jax.tree.flatten(params[f"segment_{i}"][f"block_{j}"])
            split = [_split(x, segment.repeats) for x in arrays]
            for repeat, leaves in enumerate(zip(*split, strict=True)):
                block = jax.tree.unflatten(tree, leaves)
                layers[f"segment_{first + repeat * step}"] = {"block_0": block}
    return layers


def _split(x: jax.Array, count: int) -> list[jax.Array]:
    if count == 1:
        return [x]
    parts = jax.block_until_ready(jnp.split(x, count))
    x.delete()
    return parts


def stack(layers: Sequence[dict[str, Any]], plan: Plan) -> dict[str, Any]:
    """The inverse of `unstack`."""
    params: dict[str, Any] = {}
    position = 0
    for i, segment in enumerate(plan):
        period = len(segment.pattern)
        end = position + period * segment.repeats
        # Block j is every `period`-th layer of the segment, from its j-th on.
        params[f"segment_{i}"] = {
            f"block_{j}": jax.tree.map(
                lambda *x: jnp.stack(x), *layers[position + j : end : period]
            )
            for j in range(period)
        }
        position = end
    return params
