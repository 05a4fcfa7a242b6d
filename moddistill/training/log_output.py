"""What a run prints: its log on stderr, without what other libraries repeat there."""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO

from absl import logging as absl_logging

from moddistill.distributed.processes import is_main_process

LOG = logging.getLogger("moddistill")


def start_logging() -> None:
    """Logs to stderr: this library from INFO on (main process), all others from WARNING on."""
    sys.stderr = _Stderr(sys.stderr)  # type: ignore[assignment]
    logging.basicConfig(
        format="%(levelname).1s%(asctime)s %(filename)s:%(lineno)d] %(message)s",
        datefmt="%m%d %H:%M:%S",
        force=True,  # Orbax has installed a handler of absl
    )
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax
    # Orbax raises the errors too whose tracebacks it logs.
    absl_logging.get_absl_logger().addFilter(lambda record: not record.exc_info)
    sys.unraisablehook = functools.partial(_print_error, sys.unraisablehook)
    LOG.setLevel(logging.INFO if is_main_process() else logging.WARNING)


class _Stderr:
    """Standard error whose disk may be full, or whose reader may have gone: neither ends a run."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _print_error(print_error: Callable[[Any], None], found: Any) -> None:
    """Prints an error that could not be raised, but not what follows from one that was.

    After a write that failed, TensorStore reports the others to an event loop that Orbax has
    closed. One that could not be made, for want of descriptors, cannot be closed either.
    """
    if not any(text in str(found.exc_value) for text in ("Event loop is closed", "_ssock")):
        print_error(found)
