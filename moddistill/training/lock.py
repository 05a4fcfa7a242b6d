"""One run at a time in a workdir."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moddistill.distributed.processes import broadcast_from_main, is_main_process
from moddistill.errors import UserError, invalid

_NAME = ".lock"


@contextlib.contextmanager
def locked(workdir: Path, flag: str = "--workdir") -> Iterator[None]:
    """Holds the lock of a workdir, which ends with the main process, however that ends.

    Args:
      flag: that named the folder, for messages.

    Raises:
      UserError: on all processes, if another run holds it.
    """
    with contextlib.ExitStack() as stack:
        holder = 0
        if is_main_process():
            workdir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((workdir / _NAME).open("a+"))
            holder = _lock(file, flag)
        if holder := broadcast_from_main(holder):
            raise UserError(
                f"{flag}: expected a folder without a run in progress, got {str(workdir)!r}, "
                f"in which process {holder} runs"
            )
        yield


def _lock(file: IO[str], flag: str) -> int:
    """Locks a file, and writes the id of this process to it.

    Returns:
      The id of another process that holds it, -1 if it is unknown, or 0.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # held
        file.seek(0)
        text = file.read().strip()
        return int(text) if text.isdecimal() else -1
    except OSError as error:
        expected = "a folder on a file system with locks (flock)"
        raise invalid(flag, str(Path(file.name).parent), f"{expected}: {error}") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return 0
