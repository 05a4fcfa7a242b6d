"""Errors that this project raises on purpose, and the setting that each of them is about."""

import contextlib
import difflib
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

_OURS = ("moddistill", "tools", "experiments")


def is_ours(error: BaseException) -> bool:
    """True if code of this project raised the error, rather than a library that it calls."""
    # An experiment is loaded by the path that was typed, which may be relative.
    raiser = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    root = Path(__file__).resolve().parents[1]
    return raiser.is_relative_to(root) and raiser.relative_to(root).parts[0] in _OURS


@contextlib.contextmanager
def at_field(name: str) -> Iterator[None]:
    """Puts the name of a setting before the message of a ValueError raised here by this project.

    A message that names a setting already (`config.x` in `config.y`) stays as it is; so do errors
    of other libraries. One that begins with the last part of the name continues it.

        with at_field("config.student"):
            read_model_config("runs/x")  # config.student: 'runs/x' is not a model folder: ...
        with at_field("config.moe"):
            check_moe(config.moe)  # config.moe.top_k is 5; accepted: ...
    """
    try:
        yield
    except ValueError as error:
        text, (part, _, last) = str(error), name.rpartition(".")
        if not is_ours(error) or text.startswith(name.partition(".")[0] + "."):
            raise
        message = f"{part}.{text}" if text.startswith(f"{last}.") else f"{name}: {text}"
        raise ValueError(message) from error


def nearest(name: str, accepted: Iterable[str]) -> str:
    """`; did you mean X?` for the accepted name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(accepted), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
