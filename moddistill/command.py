"""What entry points share: errors as one line, and the flags of those that take an experiment."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from moddistill.processes import join

_PARSERS = {"absl", "ml_collections"}
_OURS = ("moddistill", "tools", "experiments")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the process with the message alone for errors that this project raises on purpose.

    Errors from inside other libraries keep their traceback, which says more than their message.
    """
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        if _is_ours(error):
            sys.exit(f"error: {error}")
        raise


def _is_ours(error: BaseException) -> bool:
    """Whether code of this project raised it."""
    raiser = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    root = Path(__file__).parents[1]
    return raiser.is_relative_to(root) and raiser.relative_to(root).parts[0] in _OURS


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
            join(coordinator.value, processes.value, process.value)
            main(config.value, workdir.value)

    app.run(run, flags_parser=parse_flags)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """The parser of `absl.app.run`, with one line for a mistake in `--config` and its overrides.

    An error in the code of an experiment keeps its traceback.
    """
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
    except (AttributeError, KeyError) as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]
        if not all(_PARSERS & set(Path(frame.filename).parts) for frame in frames):
            raise
        # ml_collections looks overrides up as attributes, and may wrap the error with the nearest.
        [cause] = error.args
        message = " ".join(str(cause.args[0] if isinstance(cause, KeyError) else cause).split())
        raise SystemExit(f"--config has no such setting: {message}") from None


def _cause(error: BaseException) -> BaseException:
    """The error of this project that a parser of flags has put its own words around, or `error`."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ValueError) and _is_ours(inner):
            return inner
        inner = inner.__context__
    return error
