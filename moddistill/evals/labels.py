"""Short names of models and folders."""

import os
from collections.abc import Sequence
from pathlib import Path

from moddistill.errors import UserError


def labels(paths: Sequence[str], origin: str) -> list[str]:
    """Returns for each path the last parts that tell it from the others, joined by `-`.

    A last part `model`, as in `runs/demo/d2s/model`, is left out where there is another.

    >>> labels(["runs/a/d2s/model", "runs/b/d2s/model"], "--compare")
    ['a-d2s', 'b-d2s']

    Raises:
      UserError: naming `origin`, if two paths are the same.
    """
    # Without `.` and `..`; a hub name is no path here.
    found = [os.path.abspath(path) if os.path.exists(path) else path for path in paths]
    parts = [Path(path).parts for path in found]
    parts = [each[:-1] if len(each) > 1 and each[-1] == "model" else each for each in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{origin}: expected different models or folders, got {' '.join(paths)}")
