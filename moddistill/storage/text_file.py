"""Writing of the small files of a run, so that no interruption leaves one that is wrong.

A file is replaced as a whole, or grows by whole lines, of which an interruption can only cut the
last; readers drop a last line without its end. A full disk is a `UserError` that names the file.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moddistill.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raises UserError that names a file or folder which cannot be written for lack of space."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # those of TensorStore and tokenizers have the reason as text only
        reason = _full(error)
        if reason is None:
            raise
        raise UserError(
            f"{path}: expected a disk with enough space, got {reason!r}; the same command "
            "continues once there is room"
        ) from error


def _full(error: Exception) -> str | None:
    """Returns the reason in an error for lack of space; None for other errors."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _NO_SPACE else None
    return next((text for text in map(os.strerror, _NO_SPACE) if text in str(error)), None)


def replace_text(file: Path, text: str) -> None:
    """Writes a file in UTF-8; an interrupted write, or a power failure, leaves the file as it was.

    Raises:
      UserError: the disk is full.
      OSError: the file cannot be written for another reason.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        with writing(file):
            with partial.open("w", encoding="utf-8") as opened:
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
            partial.replace(file)
            sync_folder(file.parent)
    except OSError as error:
        error.filename, error.filename2 = str(file), None  # users know no partial file
        raise


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(file: Path, content: bytes) -> None:
    """Appends to a file without a buffer, from which a full disk would be noticed too late.

    Raises:
      UserError: the disk is full.
    """
    with writing(file), file.open("ab", buffering=0) as opened:
        write_all(opened, content)


def append_lines(file: Path, lines: bytes) -> None:
    """Appends whole lines; those of several processes do not mix.

    A last line that an interruption has cut is ended first, so that it stays one line.

    Raises:
      UserError: the disk is full.
    """
    with writing(file), file.open("a+b", buffering=0) as opened:  # O_APPEND
        if opened.seek(0, os.SEEK_END):
            opened.seek(-1, os.SEEK_END)
            lines = lines if opened.read(1) == b"\n" else b"\n" + lines
        write_all(opened, lines)


def write_all(opened: IO[bytes], content: bytes) -> None:
    """Writes to a file without a buffer, whose disk may take a part only."""
    while content:
        content = content[opened.write(content) :]
