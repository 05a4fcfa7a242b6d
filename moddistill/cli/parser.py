"""The parser of all commands: the docstring as help, config fields with their ranges, short errors.

parser = Parser(__doc__, config=TrainConfig)  # adds --config and its overrides
parser.add_argument("--workdir", required=True, help="folder of the run")
args = parser.parse_args(argv)                # args.config: a ConfigDict
"""

import argparse
import contextlib
import errno
import os
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from moddistill.cli.experiment import read_experiment
from moddistill.cli.fields import Field, sections, type_name
from moddistill.errors import StoppedError, UserError, did_you_mean, one_line, printable
from moddistill.ranges import Range

# Messages of argparse in the grammar of all others: value, origin, expectation.
_ARGPARSE_MESSAGES = (
    (r"^(.+?): invalid choice: (.+) \(choose from (.+)\)$", r"\1: expected one of \3, got \2"),
    (r"^(.+?): invalid (\w+) value: (.+)$", r"\1: expected a value of type \2, got \3"),
    (r"^the following arguments are required: (.+)$", r"expected \1, got no such argument"),
)
_OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # without a name
_INDENT = " " * 24  # column of descriptions, as in argparse
_FIELDS = "\nconfig fields, with defaults that an experiment file may replace:"


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Ends the process with exit code 1 and one line for a `UserError` or an error of a file.

    Lack of memory is one line too: sizes that users choose decide about it.

    After SIGTERM or Ctrl-C, the exit code is that of a process that the signal ended, 143 or 130.

    All other exceptions are defects and keep their traceback.
    """
    try:
        yield
    except UserError as error:
        sys.exit(printable(f"error: {error}"))
    except StoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # of a reader such as `head`, which has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python has not written yet
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno == errno.EMFILE:
            sys.exit(printable(f"error: {_lacking(error)}"))
        name = error.filename2 or error.filename  # the second one is that to be replaced
        if name is None and error.errno not in _OF_OUTPUT:
            raise
        sys.exit(printable(f"error: {name or 'output'}: {error.strerror}"))
    except (MemoryError, RuntimeError, ValueError) as error:
        lacking = _lacking(error)
        if lacking is None:
            raise
        sys.exit(printable(f"error: {lacking}"))


def _lacking(error: Exception) -> str | None:
    """Returns what a run had too little of, memory or descriptors; None for other errors."""
    # Of JAX's and TensorStore's errors only the text tells, and not all commands import these.
    text = str(error)
    if isinstance(error, MemoryError) or text.startswith("RESOURCE_EXHAUSTED"):
        reason = one_line(text) or "out of memory"
        return f"memory: expected enough for this run, got an error: {reason}"
    reason = os.strerror(errno.EMFILE)
    if reason in text:
        return f"descriptors: expected enough for this run (ulimit -n), got {reason!r}"
    return None


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose mistakes are one line, with exit code 2.

    Args:
      description: the docstring of the command.
      config: config dataclass of the experiment that the command reads, if any. Adds `--config` and
        `--config.FIELD`; the parsed `config` is a ConfigDict with the overrides applied.
      prog: the command as a module; a console script is shown by its own name.
      kwargs: of `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        description: str = "",
        *,
        config: type | None = None,
        prog: str | None = None,
        **kwargs: Any,
    ):
        kwargs = {"formatter_class": _HelpFormatter, "allow_abbrev": False} | kwargs
        script = Path(sys.argv[0]).name
        prog = script if prog and script.startswith("moddistill-") else prog
        super().__init__(description=description, prog=prog, **kwargs)
        self.config = config
        if config is not None:
            self.add_argument(
                "--config",
                required=True,
                metavar="FILE[:ARGUMENT]",
                help="experiment file, whose get_config(ARGUMENT) makes the config",
            )
            self.add_argument("--flagfile", metavar="FILE", help="file with more flags, one a line")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        if self.config is None:
            parsed, rest = self.parse_known_args(args, namespace)
        else:
            parsed, rest = self._parse_with_config(args, namespace)
        if rest:
            flag = rest[0].partition("=")[0]
            known = did_you_mean(flag, self._option_string_actions)
            self.error(f"{flag} is not a flag of this command{known}")
        return parsed

    def _parse_with_config(self, args: list[str], namespace: Any) -> tuple[Any, list[str]]:
        try:
            args = flags.FlagValues().read_flags_from_files(args)
        except flags.Error as error:
            self.error(f"--flagfile: {error}")
        # argparse knows no override; it leaves them in `rest`, with their values, in order.
        parsed, rest = self.parse_known_args(args, namespace)
        with user_errors():
            parsed.config, rest = read_experiment(parsed.config, rest)
        return parsed, rest

    def format_help(self) -> str:
        text = super().format_help()
        return text if self.config is None else text + config_help(self.config)

    def error(self, message: str) -> None:
        message = message.removeprefix("argument ")
        for pattern, expected in _ARGPARSE_MESSAGES:
            message = re.sub(pattern, expected, message)
        self.exit(2, printable(f"error: {message}; see --help\n"))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the docstring; shows the defaults of flags that take a value."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = isinstance(action.default, str | int | float) and action.default != ""
        has_default = action.nargs != 0 and shown
        return f"{action.help} (default: %(default)s)" if has_default else action.help


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `distributed.processes.initialize`."""
    parser.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="process 0, or `auto` under Slurm and on TPU pods",
    )
    parser.add_argument("--processes", type=int, help="number of processes, with HOST:PORT")
    parser.add_argument("--process", type=int, help="index of this process, with HOST:PORT")


def in_range(kind: type, **bounds: int | float) -> Callable[[str], Any]:
    """Returns the `type` of a flag that is a number within the bounds of a `Range`."""
    accepted = Range(**bounds)

    def parse(text: str) -> Any:
        value = kind(text)
        if value not in accepted:
            raise argparse.ArgumentTypeError(f"expected {accepted}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it for a text that is no number
    return parse


def config_help(config: type) -> str:
    """Returns the fields of a config dataclass and of those inside it, in argparse's layout."""
    lines = [_FIELDS]
    for section in sections(config):
        lines.append(f"\n{section.name}: {section.title}")
        lines += [_entry(f"--{section.name}.{field.name}", field) for field in section.fields]
    return "\n".join(lines) + "\n"


def _entry(flag: str, field: Field) -> str:
    bounds = f" {field.range}" if field.range else ""
    text = f"{type_name(field.type)}{bounds}: {field.description}"
    width = shutil.get_terminal_size().columns - 2
    body = textwrap.fill(text, width, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return f"  {flag}={field.default}\n{body}"
