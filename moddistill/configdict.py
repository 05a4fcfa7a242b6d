"""Config dataclasses from and to `ml_collections.ConfigDict`."""

import ast
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import ml_collections

from moddistill.errors import UserError, invalid, not_one_of
from moddistill.ranges import MAX_FLOAT32, Range
from moddistill.setting_names import unknown_setting


def check_values(config: Any, origin: str = "config") -> None:
    """Raises UserError for a number out of its range or a value outside an enumeration."""
    for name, (kind, notes) in annotations(type(config)).items():
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


def annotations(cls: type) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns the type of each field of a dataclass, and what `Annotated` adds to it."""
    kinds = typing.get_type_hints(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: (kinds[name], getattr(hint, "__metadata__", ())) for name, hint in hints.items()}


def options(kind: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the one type."""
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)


def _check_choice(kind: Any, value: Any, origin: str) -> None:
    choices = typing.get_args(kind)
    if value not in choices:
        raise not_one_of(origin, value, choices)


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """Returns a locked ConfigDict with the fields of a config dataclass."""
    return ml_collections.ConfigDict(_fields(config)).lock()


def _fields(config: Any) -> Any:
    """Returns nested dicts; a placeholder of its other type for None, so that it can be set."""
    if isinstance(config, Mapping):
        return {key: _fields(value) for key, value in config.items()}
    if not dataclasses.is_dataclass(config):
        return config
    fields = {name: _fields(value) for name, value in vars(config).items()}
    for name, kind in typing.get_type_hints(type(config)).items():
        if fields[name] is None:
            # absl refuses to override a field that is None, since its type is unknown.
            [other] = set(typing.get_args(kind)) - {types.NoneType}
            fields[name] = ml_collections.config_dict.placeholder(other)
    return fields


def from_config_dict(cls: type, values: Mapping[str, Any], origin: str = "config") -> Any:
    """Returns an instance of the config dataclass `cls` from nested mappings.

    Raises:
      UserError: for a key that `cls` does not have, a value of another type, or one outside an
        enumeration.
    """
    for setting in _strays(cls, values):
        raise unknown_setting(origin, setting, _settings(cls, values))
    return _build(cls, values, origin)


def _children(kind: Any, values: Any) -> dict[str, Any]:
    """Returns the type of each setting inside a dataclass or mapping; none for other types."""
    for option in options(kind):
        if dataclasses.is_dataclass(option):
            return typing.get_type_hints(option)
        if typing.get_origin(option) is Mapping and isinstance(values, Mapping):
            return dict.fromkeys(values, typing.get_args(option)[1])
    return {}


def _settings(kind: Any, values: Any) -> Iterator[str]:
    """Yields the dotted names of all settings; inside a mapping, of the keys in `values`."""
    for name, child in _children(kind, values).items():
        inside = values.get(name) if isinstance(values, Mapping) else None
        below = [f"{name}.{each}" for each in _settings(child, inside)]
        yield from below or [name]


def _strays(kind: Any, values: Any) -> Iterator[str]:
    """Yields the dotted names of keys in `values` that are not settings."""
    children = _children(kind, values)
    for name, value in values.items() if children and isinstance(values, Mapping) else ():
        if name not in children:
            yield name
        else:
            yield from (f"{name}.{each}" for each in _strays(children[name], value))


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
    by_class = {typing.get_origin(option) or option: option for option in options(kind)}
    if isinstance(value, Mapping):
        for option in by_class.values():
            if dataclasses.is_dataclass(option):
                return _build(option, value, origin)
            if typing.get_origin(option) is Mapping:
                inner = typing.get_args(option)[1]
                return {key: _convert(inner, x, f"{origin}.{key}") for key, x in value.items()}
    if tuple in by_class:
        # Where an experiment has text, such as a named placement, absl parses the override as text
        # too, even if it is a tuple.
        if isinstance(value, str) and value.startswith("("):
            value = _typed_tuple(value, origin)
        if isinstance(value, list | tuple):
            element = typing.get_args(by_class[tuple])[0]
            return tuple(_convert(element, x, f"{origin}[{i}]") for i, x in enumerate(value))
    if Literal in by_class:
        _check_choice(by_class[Literal], value, origin)
        return value
    # Integers widen to float; bools, a subclass of int, do not.
    if float in by_class and type(value) is int:
        if abs(value) > MAX_FLOAT32:  # `float` may overflow; `check_values` refuses infinity
            return math.inf if value > 0 else -math.inf
        return float(value)
    if not isinstance(value, tuple(by_class)) or (isinstance(value, bool) and bool not in by_class):
        names = ", ".join(option.__name__ for option in by_class)
        raise invalid(origin, value, f"a value of type {names}")
    return value


def _typed_tuple(text: str, origin: str) -> Any:
    """Parses a tuple from the command line, where the field is text: `(0, 2)`."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        expected = "a name, or a tuple such as (0, 2) or ('a', 'b')"
        raise invalid(origin, text, expected) from None
