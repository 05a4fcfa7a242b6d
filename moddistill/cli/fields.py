"""Fields of config dataclasses as `--help` and docs/config.md describe them."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from moddistill.configdict import annotations, options
from moddistill.ranges import Range


class Field(NamedTuple):
    """One field of a config dataclass, as `--help` and docs/config.md show it."""

    name: str
    type: Any
    default: Any
    range: Range | None
    description: str


class Section(NamedTuple):
    """One config dataclass: the dotted name of its place, its first line, its fields."""

    name: str
    title: str
    fields: list[Field]


def sections(cls: type, name: str = "config") -> Iterator[Section]:
    """Yields `cls` and all config dataclasses inside it; `NAME` is any key of a mapping."""
    fields, nested = [], []
    for field in dataclasses.fields(cls):
        kind, notes = annotations(cls)[field.name]
        inner = typing.get_args(kind)[1] if typing.get_origin(kind) is Mapping else kind
        if dataclasses.is_dataclass(inner):
            nested.append((inner, f"{name}.{field.name}" + (".NAME" if inner != kind else "")))
            continue
        bounds = next((note for note in notes if isinstance(note, Range)), None)
        text = next((note for note in notes if isinstance(note, str)), "")
        fields.append(Field(field.name, kind, field.default, bounds, text))
    yield Section(name, cls.__doc__.splitlines()[0], fields)
    for inner, place in nested:
        yield from sections(inner, place)


def type_name(kind: Any) -> str:
    """Returns a type as users read it, with the choices of an enumeration.

    >>> type_name(Literal["none", "full"]), type_name(int | tuple[str, ...])
    ('none | full', 'int | (str, ...)')
    """
    if len(options(kind)) > 1:
        return " | ".join(map(type_name, options(kind)))
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"({type_name(typing.get_args(kind)[0])}, ...)"
    return "None" if kind is types.NoneType else kind.__name__
