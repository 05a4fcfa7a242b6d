"""What devices send each other in a step, read from the text of a compiled program."""

import math
import re
from collections.abc import Iterator
from typing import Any

_KINDS = "all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
# An operation in two parts has the shape of its result in the second.
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-done)?\((?:.*channel_id=(\d+))?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*?^\}", re.MULTILINE | re.DOTALL)
_LOOP = re.compile(
    r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)(?:.*known_trip_count\D*(\d+))?"
)
_CALL = re.compile(r"(?:calls|to_apply|\w+_computation)=%?([\w.-]+)|branch_computations=\{(.*?)\}")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "token": 0}  # of types without their bits in the name


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Number and bytes a step of each kind of collective, of one device.

    Bytes are those of results. What lies in a loop counts once for every turn, where the number of
    turns is fixed, and once where it depends on data.
    """
    computations = {found[1]: found[0] for found in _COMPUTATION.finditer(program)}
    turns = _turns(computations)
    seen: dict[tuple[Any, ...], list[tuple[int, str]]] = {}
    for name, text in computations.items():
        for result, kind, channel in _COLLECTIVE.findall(text) if turns[name] else ():
            seen.setdefault((kind, channel, *_SHAPE.findall(result)), []).append(
                (turns[name], name)
            )
    total: dict[str, dict[str, int]] = {}
    for (kind, _, *shapes), places in seen.items():
        # The compiler for TPUs spreads an operation over all that it runs beside, even over loops
        # that it does not belong to.
        is_spread = any(name.startswith("async_collective_fusion") for _, name in places)
        count = (min if is_spread else sum)(times for times, _ in places)
        entry = total.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += count
        entry["bytes"] += count * sum(map(_bytes, shapes))
    return total


def _bytes(shape: tuple[str, str]) -> int:
    dtype, dims = shape
    bits = re.search(r"\d+", dtype)
    size = int(bits[0]) / 8 if bits else _BYTES[dtype]
    return math.ceil(size * math.prod(int(n) for n in dims.split(",") if n))


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
