"""Config dataclasses from and to `ml_collections.ConfigDict`."""

import ast
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import ml_collections

from moddistill.config import MAX_FLOAT32, Range
from moddistill.errors import UserError, invalid, not_one_of
from moddistill.setting_names import unknown_setting


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
        kind, notes = _annotated(cls)[field.name]
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
    if len(_options(kind)) > 1:
        return " | ".join(map(type_name, _options(kind)))
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"({type_name(typing.get_args(kind)[0])}, ...)"
    return "None" if kind is types.NoneType else kind.__name__


def check_values(config: Any, origin: str = "config") -> None:
    """Raises UserError for a number out of its range or a value outside an enumeration."""
    for name, (kind, notes) in _annotated(type(config)).items():
        value, place = getattr(config, name), f"{origin}.{name}"
        if dataclasses.is_dataclass(value):
            check_values(value, place)
        elif isinstance(value, Mapping):
            for key, each in value.items():
                check_values(each, f"{place}.{key}")
        elif typing.get_origin(kind) is Literal:
            _check_choice(kind, value, place)
        for note in notes:
            if isinstance(note, Range) and value not in note:
                kind = "" if abs(value) <= MAX_FLOAT32 else "a finite float32 "
                raise invalid(place, value, f"{kind}{note}")


def _annotated(cls: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The type of each field and what `Annotated` says about it."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        name: (typing.get_args(hint)[0], hint.__metadata__)
        if typing.get_origin(hint) is Annotated
        else (hint, ())
        for name, hint in hints.items()
    }


def _check_choice(kind: Any, value: Any, origin: str) -> None:
    choices = typing.get_args(kind)
    if value not in choices:
        raise not_one_of(origin, value, choices)


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the fields of a config dataclass."""
    return ml_collections.ConfigDict(_fields(config)).lock()


def _fields(config: Any) -> Any:
    """Nested dicts; a field that is None keeps its other type, or nothing could be put there."""
    if isinstance(config, Mapping):
        return {key: _fields(value) for key, value in config.items()}
    if not dataclasses.is_dataclass(config):
        return config
    fields = {name: _fields(value) for name, value in vars(config).items()}
    for name, kind in typing.get_type_hints(type(config)).items():
        if fields[name] is None:
            [other] = set(typing.get_args(kind)) - {types.NoneType}
            fields[name] = ml_collections.config_dict.placeholder(other)
    return fields


def from_config_dict(cls: type, values: Mapping[str, Any], origin: str = "config") -> Any:
    """An instance of the config dataclass `cls` from nested mappings.

    Raises:
      UserError: for a key that `cls` does not have, a value of another type or none of the
        accepted ones, naming both.
    """
    for setting in _strays(cls, values):
        raise unknown_setting(origin, setting, _settings(cls, values))
    return _build(cls, values, origin)


def _children(kind: Any, values: Any) -> dict[str, Any]:
    """The type of each setting inside a config dataclass or a mapping; none for other types."""
    for option in _options(kind):
        if dataclasses.is_dataclass(option):
            return typing.get_type_hints(option)
        if typing.get_origin(option) is Mapping and isinstance(values, Mapping):
            return dict.fromkeys(values, typing.get_args(option)[1])
    return {}


def _settings(kind: Any, values: Any) -> Iterator[str]:
    """Dotted names of all settings; inside a mapping, those of the keys that `values` has."""
    for name, child in _children(kind, values).items():
        inside = values.get(name) if isinstance(values, Mapping) else None
        below = [f"{name}.{each}" for each in _settings(child, inside)]
        yield from below or [name]


def _strays(kind: Any, values: Any) -> Iterator[str]:
    """Dotted names of keys in `values` that are not settings."""
    children = _children(kind, values)
    for name, value in values.items() if children and isinstance(values, Mapping) else ():
        if name not in children:
            yield name
        else:
            yield from (f"{name}.{each}" for each in _strays(children[name], value))


def _options(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def _build(cls: type, values: Mapping[str, Any], origin: str) -> Any:
    fields = typing.get_type_hints(cls)
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise UserError(f"{origin}: expected a value for {', '.join(missing)}, got none")
    return cls(
        **{key: _convert(fields[key], value, f"{origin}.{key}") for key, value in values.items()}
    )


def _convert(kind: Any, value: Any, origin: str) -> Any:
    """Returns `value` as a value of type `kind`: nested mappings become dataclasses, lists tuples.

    Raises:
      UserError: for a value of another type, or outside an enumeration.
    """
    options = {typing.get_origin(option) or option: option for option in _options(kind)}
    if isinstance(value, Mapping):
        for option in options.values():
            if dataclasses.is_dataclass(option):
                return _build(option, value, origin)
            if typing.get_origin(option) is Mapping:
                inner = typing.get_args(option)[1]
                return {key: _convert(inner, x, f"{origin}.{key}") for key, x in value.items()}
    if tuple in options:
        if isinstance(value, str) and value.startswith("("):
            value = _typed_tuple(value, origin)
        if isinstance(value, list | tuple):
            element = typing.get_args(options[tuple])[0]
            return tuple(_convert(element, x, f"{origin}[{i}]") for i, x in enumerate(value))
    if Literal in options:
        _check_choice(options[Literal], value, origin)
        return value
    if float in options and type(value) is int:
        return float(value)
    if not isinstance(value, tuple(options)) or (isinstance(value, bool) and bool not in options):
        names = ", ".join(option.__name__ for option in options)
        raise invalid(origin, value, f"a value of type {names}")
    return value


def _typed_tuple(text: str, origin: str) -> Any:
    """A tuple as it is typed on the command line, where such a field is text: `(0, 2)`."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        expected = "a name, or a tuple such as (0, 2) or ('a', 'b')"
        raise invalid(origin, text, expected) from None
