"""Experiment files and the overrides of their settings on the command line."""

import ast
import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from moddistill.config import SourceConfig, TaskConfig
from moddistill.errors import UserError, invalid
from moddistill.setting_names import unknown_setting


def read_experiment(path: str, args: Sequence[str]) -> tuple[ConfigDict, list[str]]:
    """Reads an experiment and applies `--config.FIELD=VALUE`, as ml_collections parses it.

    An override may name a source of records, or a task, that the experiment does not have, which
    is added.

    Args:
      path: `FILE` or `FILE:ARGUMENT`; the config is `get_config()` or `get_config(ARGUMENT)`.
      args: of the command line, without those that the command itself knows.

    Returns:
      The config, and what is left of `args`.

    Raises:
      UserError: for a file that cannot be an experiment, or a setting that the experiment does not
        have or of another type. An error in the code of an experiment keeps its traceback.
    """
    config = _load(path)
    overrides = _overrides(args)
    for name, value in overrides.items():
        _add_named(config, name, overrides)
        _check_setting(config, name)
        _check_part(config, name, value)
    args = [path, *args]  # the first is the name of the program
    # One flag of absl per override, in a set of their own: absl's global flags stay unparsed.
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=args)
        rest = values(args, known_only=True)
    except flags.Error as error:
        raise _wrong_value(config, overrides, error) from None
    return values.config, rest[1:]


def _wrong_value(config: ConfigDict, overrides: Mapping[str, str], error: flags.Error) -> UserError:
    """Returns the error for the override whose value absl cannot parse, else absl's message."""
    for name, value in overrides.items():
        if str(error).startswith(f"flag --config.{name}={value}: "):
            part, _, field = name.rpartition(".")
            kind = (_at(config, part) if part else config).get_type(field)
            return invalid(f"config.{name}", value, f"a value of type {kind.__name__}")
    return UserError(str(error))


def _load(path: str) -> ConfigDict:
    # Unlike the loader of ml_collections, errors in the file keep their type and traceback.
    file, *argument = path.split(":", 1)
    if not Path(file).is_file():
        raise invalid("--config", file, "an experiment file")
    loader = importlib.machinery.SourceFileLoader("config_config", file)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise invalid("--config", file, "a file that defines get_config()")
    config = module.get_config(*argument)
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"{file}: expected a ConfigDict from get_config(), got {kind}")
    return config.lock()


def _overrides(args: Sequence[str]) -> dict[str, str]:
    """Returns names and values of `--config.NAME=VALUE` and `--config.NAME VALUE`, as typed."""
    # Without `=`, the value is the next word; only checks of parts and new parts read it.
    found = {}
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        if match := re.fullmatch(r"(?s)--?(?:no)?config\.([^=]+)(?:=(.*))?", arg):
            found[match[1]] = following if match[2] is None else match[2]
    return found


class _Named(NamedTuple):
    """Parts of a config under names of the user's choice: what one is, and the field it needs."""

    kind: type
    noun: str
    field: str
    value: str


_NAMED = {
    "data.sources": _Named(SourceConfig, "source", "path", "FILE"),
    "tasks": _Named(TaskConfig, "task", "task", "NAME"),
}


def _named(name: str) -> _Named | None:
    """Returns what `name` holds, such as `stages.d2s.data.sources`, if users name its parts."""
    found = (row for key, row in _NAMED.items() if name == key or name.endswith(f".{key}"))
    return next(found, None)


def _add_named(config: ConfigDict, setting: str, overrides: Mapping[str, str]) -> None:
    """Adds the part of `[...]data.sources.NAME.FIELD` if its path is among the overrides.

    Parts of `tasks` likewise, whose field is the task.

    Raises:
      UserError: if there is no such part, and no path that would make it a new one.
    """
    names = "|".join(map(re.escape, _NAMED))
    match = re.fullmatch(rf"((?:.+\.)?(?:{names}))\.([^.]+)(\.[^.]+)?", setting)
    row = match and _named(match[1])
    parts = row and _at(config, match[1])
    if not isinstance(parts, ConfigDict) or match[2] in parts:
        return
    part = f"{match[1]}.{match[2]}"
    new = f"--config.{part}.{row.field}={row.value}"
    if not match[2].isidentifier():
        raise invalid(f"config.{part}", match[2], "a name of letters, digits and _")
    if not match[3]:
        raise invalid(f"config.{part}", overrides[setting], new)
    if f"{part}.{row.field}" not in overrides:
        raise UserError(
            f"config.{part} is not a {row.noun}: expected one of "
            f"{', '.join(parts) or 'none yet'}, or a new one with {new}"
        )
    with parts.unlocked():
        parts[match[2]] = ConfigDict(dataclasses.asdict(row.kind()))


def _check_setting(config: ConfigDict, setting: str) -> None:
    """Raises UserError with the nearest setting if there is none of that dotted name."""
    if not setting.isprintable():
        raise invalid("--config", setting, "the name of a setting")
    if "[" not in setting and _at(config, setting) is _MISSING:
        raise unknown_setting("config", setting, list(_settings(config)))


def _check_part(config: ConfigDict, name: str, value: str) -> None:
    """Raises UserError if `name` contains settings and `value` is not a dict of them."""
    part = _at(config, name)
    if not isinstance(part, ConfigDict):
        return
    with contextlib.suppress(ValueError, SyntaxError):
        if isinstance(ast.literal_eval(value), dict):
            return
    if row := _named(name):
        expected = (
            f"--config.{name}.NAME.{row.field}={row.value}, which adds a {row.noun}, or "
            f"--config.{name}=\"{{'NAME': {{'{row.field}': '{row.value}'}}}}\", which replaces all"
        )
    elif "path" in part:
        expected = f"--config.{name}.path=FILE"
    else:
        expected = f"its settings one by one, such as --config.{name}.{next(_settings(part))}=VALUE"
    raise invalid(f"config.{name}", value, expected)


_MISSING = object()


def _at(config: ConfigDict, setting: str) -> Any:
    """Returns the value at a dotted name, or `_MISSING`."""
    value: Any = config
    for part in setting.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _settings(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of all values in a config."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name
