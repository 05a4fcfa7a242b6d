"""A run that is killed before its Nth change of a file.

    python -m tests.soak.interrupted FOLDER N ARGUMENTS...

runs `moddistill.train ARGUMENTS`. Counted are the openings for writing, new folders, renames and
removals that Python makes in FOLDER; with N = 0 their number is printed at the end instead.
"""

import atexit
import os
import runpy
import signal
import sys

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main(folder: str, last: int, arguments: list[str]) -> None:
    count = 0

    def before(event: str, args: tuple) -> None:
        nonlocal count
        opens = event == "open" and isinstance(args[2], int) and args[2] & _WRITES
        if not (opens or event in _CHANGES) or not isinstance(args[0], (str, os.PathLike)):
            return
        if not os.path.abspath(args[0]).startswith(folder):
            return
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)

    if not last:
        atexit.register(lambda: print(f"changes: {count}", file=sys.stderr))
    sys.addaudithook(before)
    sys.argv = ["moddistill.train", *arguments]
    runpy.run_module("moddistill.train", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
