"""Output folders that appear under their name when complete, with the digests of all their files.

1. Files are written to a hidden folder next to the target, `.NAME.TOKEN.partial`.
2. `digests.json` is written into it, after forcing all files to the disk.
3. A folder to be replaced is renamed to `.NAME.TOKEN.old`, then the new one to its name.
4. The old one is removed.

A process that is killed between the two renames of step 3 leaves both hidden folders; the next
writer of the same name restores the old one.
"""

import contextlib
import glob
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from moddistill.distributed.processes import barrier, broadcast_from_main, is_main_process
from moddistill.errors import UserError
from moddistill.storage.digests import check_outside, verify, write_digests
from moddistill.storage.text_file import writing

_UNFINISHED, _REPLACED = ".partial", ".old"


@contextlib.contextmanager
def write_folder(
    folder: Path, written_by: str, overwrite: bool, inputs: Sequence[Path] = ()
) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `folder` when the block ends.

    Several writers may run at once, each with its own temporary folder. After an error it is
    removed.

    Args:
      written_by: the command, for `digests.json`.
      overwrite: whether to replace a folder that the same command wrote and that is unchanged.
      inputs: files and folders being read, none of which may be in `folder`.

    Raises:
      UserError: if `folder` exists, at the start or at the end, and may not be replaced; if the
        disk is full.
    """
    target = folder.resolve()
    check_outside(target, "--out")
    _restore_replaced(target)
    for source in inputs:
        if target.exists() and source.exists() and source.resolve().is_relative_to(target):
            raise UserError(
                f"{str(folder)!r}: expected a folder without inputs of this command, got one that "
                f"contains {str(source)!r}"
            )
    _check_free(target, written_by, overwrite)
    tmp_dir = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_UNFINISHED}")
    with _renamed_when_complete(tmp_dir, target, written_by, overwrite):
        yield tmp_dir


@contextlib.contextmanager
def write_shared_folder(folder: Path, written_by: str) -> Iterator[Path]:
    """As `write_folder` with `overwrite`, for all processes of a run, which share the folder.

    The main process creates and renames it, and removes unfinished ones of earlier runs.
    """
    target = folder.resolve()
    token = broadcast_from_main(secrets.randbits(31))
    tmp_dir = target.with_name(f".{target.name}.{token:08x}{_UNFINISHED}")
    with contextlib.ExitStack() as stack:
        if is_main_process():
            _restore_replaced(target)
            for unfinished in _unfinished(target):
                shutil.rmtree(unfinished)
        barrier(f"clean up before {folder}")
        check_replaceable(folder, written_by)
        if is_main_process():
            stack.enter_context(_renamed_when_complete(tmp_dir, target, written_by, overwrite=True))
        barrier(f"create {folder}")
        yield tmp_dir
        barrier(f"write {folder}")


def check_replaceable(folder: Path, written_by: str) -> None:
    """Checks, in all processes together, that `write_shared_folder` may replace a folder.

    Raises:
      UserError: if `folder` exists, unless the same command wrote it and it is unchanged.
    """
    expected = f"an unchanged folder that {written_by} wrote, or none (remove or rename this one)"
    _check_free(folder.resolve(), written_by, overwrite=True, expected=expected, shared=True)


@contextlib.contextmanager
def _renamed_when_complete(
    tmp_dir: Path, folder: Path, written_by: str, overwrite: bool
) -> Iterator[None]:
    try:
        with writing(folder):
            tmp_dir.mkdir(parents=True)
            yield
            write_digests(tmp_dir, written_by)
            _replace(tmp_dir, folder, written_by, overwrite)
    finally:
        shutil.rmtree(tmp_dir, ignore_errors=True)


def _replace(new: Path, folder: Path, written_by: str, overwrite: bool) -> None:
    """Renames `new` to `folder`, which is at no time visible in part."""
    # Checked again, since another process may have created `folder` in the meantime.
    _check_free(folder, written_by, overwrite)
    old = new.with_suffix(_REPLACED)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        _restore_replaced(folder)
        _check_free(folder, written_by, overwrite=False)  # another process was faster
        raise
    finally:
        # Without the new folder, the old one is the only copy.
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _restore_replaced(folder: Path) -> None:
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
    folder: Path, written_by: str, overwrite: bool, expected: str = "", shared: bool = False
) -> None:
    """Raises UserError if a folder exists, unless it may be overwritten.

    Args:
      expected: what the message asks for, where that is not `--overwrite`.
      shared: whether all processes call this together.
    """
    if not folder.exists():
        return
    origin = repr(str(folder))
    if not (overwrite and folder.is_dir()):
        expected = expected or "a new folder, or --overwrite"
        raise UserError(f"{origin}: expected {expected}, got one that exists")
    expected = (
        expected or f"a new folder, or --overwrite of an unchanged one that {written_by} wrote"
    )
    # A mistyped path must never remove these, whatever their digests say.
    for name, path in (("working", Path.cwd()), ("home", Path.home())):
        if path.is_relative_to(folder):
            raise UserError(
                f"{origin}: expected {expected}, got one that contains the {name} directory"
            )
    writer = verify(folder, expected=expected, shared=shared).written_by
    if writer != written_by:
        raise UserError(f"{origin}: expected {expected}, got one that {writer} wrote")
