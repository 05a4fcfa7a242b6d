"""Errors that this project raises on purpose, and the setting that each of them is about."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

_OURS = ("moddistill", "tools", "experiments")


def is_ours(error: BaseException) -> bool:
    """True if code of this project raised the error, rather than a library that it calls."""
    raiser = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    root = Path(__file__).parents[1]
    return raiser.is_relative_to(root) and raiser.relative_to(root).parts[0] in _OURS


@contextlib.contextmanager
def at_field(name: str) -> Iterator[None]:
    """Puts `name: ` before the message of a ValueError that this project raises in the block.

    A message that names a setting of the same kind already (`config.x` in `config.y`) stays as it
    is; so do errors of other libraries.

        with at_field("config.student"):
            read_model_config(config.student)  # config.student: 'runs/x' is not a model folder: ...
    """
    try:
        yield
    except ValueError as error:
        if not is_ours(error) or str(error).startswith(name.partition(".")[0] + "."):
            raise
        raise ValueError(f"{name}: {error}") from error
