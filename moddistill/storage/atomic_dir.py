"""Folders that get their name, and their digests, when everything in them is written."""

import contextlib
import errno
import glob
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from moddistill.distributed.processes import barrier, broadcast_from_main, is_main_process
from moddistill.errors import UserError
from moddistill.storage.digests import check_outside, verify, write_digests

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNFINISHED, _REPLACED = ".partial", ".old"


@contextlib.contextmanager
def new_folder(
    folder: Path, written_by: str, overwrite: bool, keep: Sequence[Path] = ()
) -> Iterator[Path]:
    """A folder to write into, which is named `folder` when everything is written.

    Every writer has one of its own. One that fails is removed; if the process is killed, it remains
    as `.NAME.*.partial`.

    Args:
      written_by: the command, for `digests.json`, which is written at the end.
      overwrite: whether to replace a folder that the same command wrote and that is unchanged.
      keep: files and folders that are read; `folder` may not be one of them or hold one.

    Raises:
      UserError: if `folder` exists, now or at the end, and may not be replaced; if the disk is
        full.
    """
    target = folder.resolve()
    check_outside(target, "--out")
    _put_back(target)
    for source in keep:
        if target.exists() and source.exists() and source.resolve().is_relative_to(target):
            raise UserError(f"{str(folder)!r} holds {str(source)!r}, which is being read")
    _check_free(target, written_by, overwrite)
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_UNFINISHED}")
    with _named_when_written(aside, target, written_by, overwrite):
        yield aside


@contextlib.contextmanager
def new_folder_of_all(folder: Path, written_by: str) -> Iterator[Path]:
    """As `new_folder` with `overwrite`, for all processes of one run, which share one folder.

    The first process makes and names it. Unfinished ones of earlier runs are removed.
    """
    target = folder.resolve()
    token = broadcast_from_main(secrets.randbits(31))
    aside = target.with_name(f".{target.name}.{token:08x}{_UNFINISHED}")
    with contextlib.ExitStack() as stack:
        if is_main_process():
            _put_back(target)
            for unfinished in _unfinished(target):
                shutil.rmtree(unfinished)
        barrier(f"tidying for {folder}")
        check_replaceable(folder, written_by)
        if is_main_process():
            stack.enter_context(_named_when_written(aside, target, written_by, overwrite=True))
        barrier(f"making {folder}")
        yield aside
        barrier(f"filling {folder}")


def check_replaceable(folder: Path, written_by: str) -> None:
    """Checks, in all processes together, what `new_folder_of_all` will find when it ends.

    Raises:
      UserError: if `folder` exists, unless the same command wrote it and it is unchanged.
    """
    accepted = f"remove or rename {str(folder)!r}"
    _check_free(folder.resolve(), written_by, overwrite=True, accepted=accepted, shared=True)


@contextlib.contextmanager
def _named_when_written(
    aside: Path, folder: Path, written_by: str, overwrite: bool
) -> Iterator[None]:
    aside.mkdir(parents=True)
    try:
        yield
        write_digests(aside, written_by)
        _give_name(aside, folder, written_by, overwrite)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{str(folder)!r} cannot be written: {error.strerror}; accepted: a disk with room"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _give_name(new: Path, folder: Path, written_by: str, overwrite: bool) -> None:
    """Replaces a folder by `new`, which is never visible in part."""
    _check_free(folder, written_by, overwrite)
    old = new.with_suffix(_REPLACED)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        _put_back(folder)
        _check_free(folder, written_by, overwrite=False)  # another process was faster
        raise
    finally:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """Undoes the first of two renames, after which a process was killed."""
    if folder.exists():
        return
    for new in _unfinished(folder):
        if new.with_suffix(_REPLACED).is_dir():
            new.with_suffix(_REPLACED).rename(folder)
            return


def _unfinished(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f".{glob.escape(folder.name)}.????????{_UNFINISHED}"))


def _check_free(
    folder: Path, written_by: str, overwrite: bool, accepted: str = "", shared: bool = False
) -> None:
    """Raises UserError if a folder exists, unless it may be overwritten.

    Args:
      accepted: the way out, for the message, where it is not `--overwrite`.
      shared: whether all processes call this together.
    """
    if not folder.exists():
        return
    if not (overwrite and folder.is_dir()):
        accepted = accepted or "a new folder, or --overwrite"
        raise UserError(f"{str(folder)!r} exists; accepted: {accepted}")
    accepted = (
        accepted or f"a new folder, or --overwrite of an unchanged one that {written_by} wrote"
    )
    for name, place in (("working", Path.cwd()), ("home", Path.home())):
        if place.is_relative_to(folder):
            raise UserError(f"{str(folder)!r} holds the {name} directory; accepted: {accepted}")
    found = verify(folder, accepted=accepted, shared=shared).written_by
    if found != written_by:
        raise UserError(f"{str(folder)!r} was written by {found}; accepted: {accepted}")
