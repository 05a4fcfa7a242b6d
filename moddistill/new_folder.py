"""Folders that take their name when everything in them is written."""

import contextlib
import errno
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from moddistill.processes import is_first, wait_for_all

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool, keep: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to write into, which takes the name `folder` when everything is written.

    Every writer has one of its own. What is not finished is removed, or stays behind as
    `.NAME.*.partial` if the process is killed.

    Args:
      keep: files and folders that are read; `folder` may not be one of them or hold one.

    Raises:
      ValueError: if `folder` exists, now or at the end, and is not to be overwritten; if it would
        be overwritten as it is read; if the disk is full.
    """
    target = folder.resolve()
    _put_back(target)
    _check_free(target, overwrite)
    for source in keep:
        if target.exists() and source.exists() and source.resolve().is_relative_to(target):
            raise ValueError(f"{str(folder)!r} holds {str(source)!r}, which is being read")
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    with _named_when_written(aside, target, overwrite):
        yield aside


@contextlib.contextmanager
def new_folder_of_all(folder: Path) -> Iterator[Path]:
    """As `new_folder`, for all processes of one run, which write into the same one.

    The first process makes and names it. A folder that exists is replaced.
    """
    target = folder.resolve()
    aside = target.with_name(f".{target.name}.partial")
    with contextlib.ExitStack() as stack:
        if is_first():
            _put_back(target)
            shutil.rmtree(aside, ignore_errors=True)
            stack.enter_context(_named_when_written(aside, target, overwrite=True))
        wait_for_all(f"making {folder}")
        yield aside
        wait_for_all(f"filling {folder}")


@contextlib.contextmanager
def _named_when_written(aside: Path, folder: Path, overwrite: bool) -> Iterator[None]:
    aside.mkdir(parents=True)
    try:
        yield
        _give_name(aside, folder, overwrite)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise ValueError(
            f"{str(folder)!r} cannot be written: {error.strerror}; accepted: a disk with room"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _give_name(new: Path, folder: Path, overwrite: bool) -> None:
    """Puts `new` in the place of a folder, whose content is never there in part."""
    _check_free(folder, overwrite)
    old = _replaced(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        _put_back(folder)
        _check_free(folder, overwrite=False)  # another process was faster
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """Undoes half an exchange, after which a process was killed."""
    if not folder.exists() and _replaced(folder).is_dir():
        _replaced(folder).rename(folder)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not (overwrite and folder.is_dir()):
        raise ValueError(f"{str(folder)!r} exists; accepted: a new folder, or --overwrite")
