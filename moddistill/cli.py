"""What entry points share: errors as one line, and the flags of those that take an experiment."""

import argparse
import ast
import contextlib
import dataclasses
import itertools
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from moddistill.config import MeshConfig, SourceConfig
from moddistill.distributed.processes import initialize
from moddistill.errors import UserError
from moddistill.setting_names import unknown_setting

_PARSERS = {"absl", "ml_collections"}


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the process with the message alone for errors that this project raises on purpose.

    Errors from inside other libraries keep their traceback, which says more than their message.
    """
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")


def command_name() -> str:
    """Returns how the command was called: `python -m MODULE`, or the name of a console script."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


def run_experiment(main: Callable[[ConfigDict, str], None]) -> None:
    """Calls `main(config, workdir)` with `--config FILE[:ARGUMENT]`, its overrides and `--workdir`.

    Joins several processes first, if flags say so. Ends the process with one line for a setting
    that the experiment does not have.
    """
    config = config_flags.DEFINE_config_file("config", help_string="Experiment file.")
    flags.mark_flag_as_required("config")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    coordinator = flags.DEFINE_string(
        "coordinator", "", "HOST:PORT of process 0, or auto under Slurm and on TPU pods."
    )
    processes = flags.DEFINE_integer("processes", None, "Number of processes, with HOST:PORT.")
    process = flags.DEFINE_integer("process", None, "Index of this process, with HOST:PORT.")

    def run(_: Sequence[str]) -> None:
        with plain_errors():
            initialize(coordinator.value, processes.value, process.value)
            main(config.value, workdir.value)

    app.run(run, flags_parser=parse_flags)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """The parser of `absl.app.run`, with one line for a mistake in `--config` and its overrides.

    An override may name a source of records that the experiment does not have, which is added. An
    error in the code of an experiment keeps its traceback.
    """
    flag = flags.FLAGS["config"]
    flag.parser = _ExperimentParser(flag.parser, argv)
    try:
        rest = flags.FLAGS(argv)
        getattr(flags.FLAGS.config, "to_dict", None)  # an experiment that is missing raises here
        return rest
    except flags.Error as error:
        raise SystemExit(f"error: {_cause(error)}") from None
    except OSError as error:
        # ml_collections keeps it until the config is used.
        message = " ".join(str(error.__cause__ or error).split())
        raise SystemExit(f"error: --config cannot be read: {message}") from None
    except (AttributeError, KeyError, IndexError) as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        if not all(_PARSERS & set(Path(frame.filename).parts) for frame in frames):
            raise
        # ml_collections looks overrides up as attributes, and may wrap the error with the nearest.
        [cause] = error.args
        message = " ".join(str(cause.args[0] if isinstance(cause, KeyError) else cause).split())
        raise SystemExit(f"--config has no such setting: {message}") from None


class _ExperimentParser(flags.ArgumentParser):
    """Loads an experiment by `loader` and gets it ready for the overrides in `argv`."""

    def __init__(self, loader: flags.ArgumentParser, argv: Sequence[str]):
        super().__init__()
        self.loader = loader
        argv = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
        self.overrides: dict[str, str] = {}  # names and values as typed
        for arg, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
            if match := re.fullmatch(r"(?s)--?(?:no)?config\.([^=]+)(?:=(.*))?", arg):
                self.overrides[match[1]] = following if match[2] is None else match[2]

    def parse(self, path: str) -> Any:
        """The experiment's config, with the sources that overrides add.

        Raises:
          UserError: for an override of a setting that the experiment does not have, or of several
            at once by anything but a dict.
        """
        config = self.loader.parse(path)
        if isinstance(config, ConfigDict):
            for name, value in self.overrides.items():
                _add_source(config, name, self.overrides)
                _check_setting(config, name)
                _check_part(config, name, value)
        return config


def _add_source(config: ConfigDict, setting: str, overrides: Mapping[str, str]) -> None:
    """Adds the source that `[...]data.sources.NAME.FIELD` is about, if its path is overridden too.

    Raises:
      UserError: if there is no such source, and no path that would make it a new one.
    """
    match = re.fullmatch(r"((?:.+\.)?data\.sources)\.([^.]+)(\.[^.]+)?", setting)
    sources = match and _at(config, match[1])
    if not isinstance(sources, ConfigDict) or match[2] in sources:
        return
    source = f"{match[1]}.{match[2]}"
    if not match[2].isidentifier():
        raise UserError(
            f"config.{source}: {match[2]!r} cannot name a source here; accepted: letters, digits "
            "and _"
        )
    if not match[3]:
        raise UserError(
            f"config.{source} is {overrides[setting]!r}; accepted: --config.{source}.path=FILE"
        )
    if f"{source}.path" not in overrides:
        raise UserError(
            f"config.{source} is not a source; accepted: {', '.join(sources) or 'none yet'}, or a "
            f"new one with --config.{source}.path=FILE"
        )
    with sources.unlocked():
        sources[match[2]] = ConfigDict(dataclasses.asdict(SourceConfig()))


def _check_setting(config: ConfigDict, setting: str) -> None:
    """Raises UserError with the nearest setting if there is none of that dotted name."""
    if "[" not in setting and _at(config, setting) is _MISSING:
        raise unknown_setting("config", setting, list(_settings(config)))


def _check_part(config: ConfigDict, name: str, value: str) -> None:
    """Raises UserError if `name` has settings in it and `value` is no dict of them."""
    part = _at(config, name)
    if not isinstance(part, ConfigDict):
        return
    with contextlib.suppress(ValueError, SyntaxError):
        if isinstance(ast.literal_eval(value), dict):
            return
    if re.fullmatch(r"(.+\.)?data\.sources", name):
        accepted = (
            f"--config.{name}.NAME.path=FILE, which adds a source, or "
            f"--config.{name}=\"{{'NAME': {{'path': 'FILE'}}}}\", which replaces all"
        )
    elif "path" in part:
        accepted = f"--config.{name}.path=FILE"
    else:
        accepted = f"its settings one by one, such as --config.{name}.{next(_settings(part))}=VALUE"
    raise UserError(f"config.{name} is {value!r}; accepted: {accepted}")


_MISSING = object()


def _at(config: ConfigDict, setting: str) -> Any:
    """The value at a dotted name, or `_MISSING`."""
    value: Any = config
    for part in setting.split("."):
        if not isinstance(value, ConfigDict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _settings(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of all values in a config."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _cause(error: BaseException) -> BaseException:
    """The error of this project that a parser of flags has put its own words around, or `error`."""
    inner: BaseException | None = error
    while inner is not None:
        # ml_collections raises the type of the error again, with a traceback in its message.
        if isinstance(inner, UserError) and not str(inner).startswith("Error whilst parsing"):
            return inner
        inner = inner.__context__
    return error


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--model`, `--dtype` and `--mesh`, which commands that run a model share."""
    parser.add_argument(
        "--model", required=True, help="model folder, or Hugging Face folder or name"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="float32" if jax.default_backend() == "cpu" else "bfloat16",
        help="of parameters, computation and cache; by default float32 on CPUs, else bfloat16",
    )
    parser.add_argument(
        "--mesh",
        type=_mesh_config,
        metavar="AXIS=SIZE,...",
        help="devices along data, fsdp, expert and tensor, such as fsdp=4,tensor=2",
    )


def _mesh_config(text: str) -> MeshConfig:
    try:
        sizes = dict(item.split("=") for item in text.split(","))
        return MeshConfig(**{axis: int(size) for axis, size in sizes.items()})
    except (ValueError, TypeError):
        names = ", ".join(field.name for field in dataclasses.fields(MeshConfig))
        raise argparse.ArgumentTypeError(
            f"expected AXIS=SIZE,... with axes of {names}, got {text!r}"
        ) from None
