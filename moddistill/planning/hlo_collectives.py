"""Collectives of a step and their bytes, parsed from the HLO text of a compiled program.

The text is a list of computations, callees before callers, the entry computation last:

    %body (c: (s32[], bf16[4])) -> (s32[], bf16[4]) {
      %a = bf16[16]{0} all-gather(%x), channel_id=7
    }
    ENTRY %main (x: bf16[4]) -> bf16[4] {
      %w = (s32[], bf16[4]) while(%t), condition=%condition, body=%body
    }
"""

import math
import re
from collections.abc import Iterator
from typing import Any

_KINDS = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
# Asynchronous collectives are a pair of `-start` and `-done`; the type of `-done` is the result.
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-done)?\((?:.*channel_id=(\d+))?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*?^\}", re.MULTILINE | re.DOTALL)
_LOOP = re.compile(
    r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)(?:.*known_trip_count\D*(\d+))?"
)
_CALL = re.compile(r"(?:calls|to_apply|\w+_computation)=%?([\w.-]+)|branch_computations=\{(.*?)\}")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "token": 0}  # types without their bit width in the name


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Returns {kind: {"count", "bytes"}} of the collectives of a step, per device.

    Bytes are those of results. A collective in a loop counts once per iteration; once in all where
    the number of iterations depends on data.
    """
    computations = {match[1]: match[0] for match in _COMPUTATION.finditer(program)}
    executions = _execution_counts(computations)
    # Occurrences of one operation: same kind, channel and result.
    occurrences: dict[tuple[Any, ...], list[str]] = {}
    for name, text in computations.items():
        for result, kind, channel in _COLLECTIVE.findall(text) if executions[name] else ():
            operation = (kind, channel, *_SHAPE.findall(result))
            occurrences.setdefault(operation, []).append(name)
    total: dict[str, dict[str, int]] = {}
    for (kind, _, *shapes), names in occurrences.items():
        # The TPU compiler repeats one collective in a fusion for each computation that it overlaps
        # with, loops that do not contain it included. The occurrence that executes least is the
        # collective itself.
        is_overlapped = any(name.startswith("async_collective_fusion") for name in names)
        count = (min if is_overlapped else sum)(executions[name] for name in names)
        entry = total.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += count
        entry["bytes"] += count * sum(map(_num_bytes, shapes))
    return total


def _num_bytes(shape: tuple[str, str]) -> int:
    """Returns the size of an HLO shape, for example `("bf16", "16,4")`."""
    dtype, dims = shape
    bits = re.search(r"\d+", dtype)
    size = int(bits[0]) / 8 if bits else _BYTES[dtype]
    return math.ceil(size * math.prod(int(n) for n in dims.split(",") if n))


def _execution_counts(computations: dict[str, str]) -> dict[str, int]:
    """Returns how often each computation executes in a step."""
    counts = dict.fromkeys(computations, 0)
    counts[next(reversed(computations))] = 1
    # Callers come after callees, so in reverse order the count of a caller is final when its calls
    # add to their callees.
    for name in reversed(computations):
        for callee, times in _calls(computations, name):
            counts[callee] += counts[name] * times
    return counts


def _calls(computations: dict[str, str], name: str) -> Iterator[tuple[str, int]]:
    """Yields (callee, executions per execution of the caller)."""
    for condition, body, trip_count in _LOOP.findall(computations[name]):
        yield body, int(trip_count or _loop_bound(computations[condition]))
    for callee, branches in _CALL.findall(computations[name]):
        callees = [callee] if callee else re.findall(r"[\w.-]+", branches)
        yield from ((name, 1) for name in callees)


def _loop_bound(condition: str) -> int:
    """Returns the constant n of a loop condition `i < n`; 1 for any other condition."""
    is_less_than = "compare(" in condition and "direction=LT" in condition
    bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", condition)
    return int(bounds[0]) if is_less_than and len(bounds) == 1 else 1
