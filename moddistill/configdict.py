"""Config dataclasses from and to `ml_collections.ConfigDict`."""

import ast
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import ml_collections

from moddistill.errors import UserError, nearest
from moddistill.setting_names import unknown_setting


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
    return typing.get_args(kind) if typing.get_origin(kind) is types.UnionType else (kind,)


def _build(cls: type, values: Mapping[str, Any], origin: str) -> Any:
    fields = typing.get_type_hints(cls)
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise UserError(f"{origin} lacks {', '.join(missing)}")
    return cls(
        **{key: _convert(fields[key], value, f"{origin}.{key}") for key, value in values.items()}
    )


def _convert(kind: Any, value: Any, origin: str) -> Any:
    options = _options(kind)
    if isinstance(value, Mapping):
        for option in options:
            if dataclasses.is_dataclass(option):
                return _build(option, value, origin)
            if typing.get_origin(option) is Mapping:
                inner = typing.get_args(option)[1]
                return {key: _convert(inner, x, f"{origin}.{key}") for key, x in value.items()}
    if typing.get_origin(kind) is Literal:
        accepted = typing.get_args(kind)
        if value not in accepted:
            hint = nearest(value, accepted) if isinstance(value, str) else ""
            raise UserError(f"{origin} is {value!r:.200}; accepted: {', '.join(accepted)}{hint}")
        return value
    plain = tuple(typing.get_origin(option) or option for option in options)
    if tuple in plain and isinstance(value, str) and value.startswith("("):
        value = _typed_tuple(value, origin)
    if isinstance(value, list | tuple):
        value = tuple(value)
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        names = ", ".join(option.__name__ for option in plain)
        raise UserError(f"{origin} is {value!r:.200}; accepted: a value of type {names}")
    if isinstance(value, tuple):
        [element] = {typing.get_args(option)[0] for option in options if typing.get_args(option)}
        return tuple(_convert(element, item, f"{origin}[{i}]") for i, item in enumerate(value))
    return value


def _typed_tuple(text: str, origin: str) -> Any:
    """A tuple as it is typed on the command line, where such a field is text: `(0, 2)`."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise UserError(
            f"{origin} is {text!r}; accepted: a name, or a tuple such as (0, 2) or ('a', 'b')"
        ) from None
