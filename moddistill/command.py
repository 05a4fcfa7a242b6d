"""What entry points share: errors as one line, and the flags of those that take an experiment."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from moddistill.processes import join

_OURS = ("moddistill", "tools", "experiments")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the process with the message alone for errors that this project raises on purpose.

    Errors from inside other libraries keep their traceback, which says more than their message.
    """
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        raiser = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        root = Path(__file__).parents[1]
        if raiser.is_relative_to(root) and raiser.relative_to(root).parts[0] in _OURS:
            sys.exit(f"error: {error}")
        raise


def run_experiment(main: Callable[[ConfigDict, str], None]) -> None:
    """Calls `main(config, workdir)` with `--config FILE[:ARGUMENT]`, its overrides and `--workdir`.

    Joins several processes first, if flags say so. Ends the process with one line for a setting
    that the experiment does not have.
    """
    config = config_flags.DEFINE_config_file("config", help_string="Experiment file.")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    coordinator = flags.DEFINE_string(
        "coordinator", "", "HOST:PORT of process 0, or auto under Slurm and on TPU pods."
    )
    processes = flags.DEFINE_integer("processes", 1, "Number of processes, with --coordinator.")
    process = flags.DEFINE_integer("process", 0, "Index of this process, with --coordinator.")

    def run(_: Sequence[str]) -> None:
        with plain_errors():
            join(coordinator.value, processes.value, process.value)
            main(config.value, workdir.value)

    app.run(run, flags_parser=parse_flags)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """The parser of `absl.app.run`, with one line for a setting that does not exist."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        # ml_collections looks overrides up as attributes, and may wrap the error with the nearest.
        [cause] = error.args
        message = " ".join(str(cause.args[0] if isinstance(cause, KeyError) else cause).split())
        raise SystemExit(f"--config has no such setting: {message}") from None
