"""What devices send each other in a step, read from the text of a compiled program."""

import math
import re
from collections.abc import Iterator

_KINDS = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
# An operation in two parts has the shape of its result in the second.
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-done)?\((?:.*channel_id=(\d+))?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*?^\}", re.MULTILINE | re.DOTALL)
_LOOP = re.compile(
    r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)(?:.*known_trip_count\D*(\d+))?"
)
_CALL = re.compile(r"(?:calls|to_apply|\w+_computation)=%?([\w.-]+)|branch_computations=\{(.*?)\}")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Number and bytes a step of each kind of collective, of one chip.

    Bytes are those of results. What lies in a loop counts once for every turn, where the number of
    turns is fixed, and once where it depends on data.
    """
    computations = {found[1]: found[0] for found in _COMPUTATION.finditer(program)}
    turns = _turns(computations)
    found: dict[tuple[str, str], tuple[int, int]] = {}
    running = {name: text for name, text in computations.items() if turns[name]}
    for name, text in running.items():
        for number, (result, kind, channel) in enumerate(_COLLECTIVE.findall(text)):
            # A compiler may spread one operation, under one channel, over work that it runs beside,
            # even over a loop that it does not belong to.
            key = kind, channel or f"{name} {number}"
            seen = turns[name], turns[name] * _bytes(result)
            found[key] = min(seen, found.get(key, seen))
    total: dict[str, dict[str, int]] = {}
    for (kind, _), (count, size) in found.items():
        entry = total.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += count
        entry["bytes"] += size
    return total


def _bytes(shapes: str) -> int:
    sizes = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(
        _BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in sizes
    )


def _turns(computations: dict[str, str]) -> dict[str, int]:
    """How often each computation runs; callers stand behind those that they call."""
    turns = dict.fromkeys(computations, 0)
    turns[next(reversed(computations))] = 1
    for name in reversed(computations):
        for called, times in _calls(computations, name):
            turns[called] += turns[name] * times
    return turns


def _calls(computations: dict[str, str], name: str) -> Iterator[tuple[str, int]]:
    for condition, body, known in _LOOP.findall(computations[name]):
        yield body, int(known or _bound(computations[condition]))
    for called, branches in _CALL.findall(computations[name]):
        names = [called] if called else re.findall(r"[\w.-]+", branches)
        yield from ((name, 1) for name in names)


def _bound(condition: str) -> int:
    """The constant that a loop counts up to; 1 where there is none."""
    counts = "compare(" in condition and "direction=LT" in condition
    bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", condition)
    return int(bounds[0]) if counts and len(bounds) == 1 else 1
