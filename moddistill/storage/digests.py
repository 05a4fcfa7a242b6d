"""SHA-256 digests of the files of a folder, so that damage is found when the folder is read.

`digests.json` is written after all other files:

    {"written_by": "import", "files": {"model.json": "5f0c...", ...}, "sha256": "98ea..."}

Names are relative to the folder. The last digest is of the rest of `digests.json` itself, whose
bytes follow from its content, so no bit of any file can change unnoticed.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import jax
import numpy as np

from moddistill.distributed.processes import any_process
from moddistill.errors import UserError

NAME = "digests.json"
UNDAMAGED = "an undamaged copy of the folder"
_LARGEST_FILE = 16 * 2**20  # bytes; a file of 100,000 names has 12 MB
_SHOWN = 3  # file names in an error


class Digests(NamedTuple):
    """The content of `digests.json`: the command that wrote the folder, and `{name: hex}`."""

    written_by: str
    files: dict[str, str]


def write_digests(folder: Path, written_by: str) -> None:
    """Writes `digests.json` of all files below a folder, after forcing them to the disk."""
    names = _list_files(folder)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _sha256(folder / name, sync=True), names)
        digests = Digests(written_by, dict(zip(names, found, strict=True)))
    with (folder / NAME).open("w") as file:
        file.write(_render(digests))
        file.flush()
        os.fsync(file.fileno())


def read_digests(folder: Path, accepted: str = UNDAMAGED) -> Digests:
    """Reads `digests.json`; UserError if it is missing or damaged."""
    file = folder / NAME
    if not file.is_file():
        raise UserError(f"{folder} has no {NAME}; accepted: {accepted}")
    with file.open("rb") as opened:
        content = opened.read(_LARGEST_FILE + 1)
    digests = _parse(content) if len(content) <= _LARGEST_FILE else None
    if digests is None:
        raise UserError(f"{file} is damaged: its own sha256 differs; accepted: {accepted}")
    return digests


def fingerprint(folder: Path) -> str:
    """Identifies the content of a folder: the digest of the digests of all its files."""
    read_digests(folder)
    return _sha256(folder / NAME)


def check_outside(folder: Path, origin: str) -> None:
    """Checks that writing to `folder` does not change a folder that has digests.

    Raises:
      UserError: if a folder above `folder` has a `digests.json`, which would no longer list all of
        its files.
    """
    for parent in folder.resolve().parents:
        if (parent / NAME).is_file():
            raise UserError(
                f"{origin}: expected a folder outside of {str(parent)!r}, whose {NAME} lists all "
                f"its files, got {str(folder)!r}"
            )


def _parse(content: bytes) -> Digests | None:
    """The content of an intact `digests.json` that names only files below its folder."""
    try:
        fields = json.loads(content)
        digests = Digests(fields["written_by"], dict(fields["files"]))
        intact = _render(digests).encode() == content
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    names = map(PurePosixPath, digests.files)
    confined = all(not name.is_absolute() and ".." not in name.parts for name in names)
    return digests if intact and confined else None


def verify(
    folder: Path,
    names: Sequence[str] | None = None,
    *,
    accepted: str = UNDAMAGED,
    shared: bool = False,
) -> Digests:
    """Compares files with `digests.json`, which it returns.

    Args:
      names: the files that will be read; all files of the folder if None, and then a file that is
        not in `digests.json` is an error too.
      accepted: the way out, for the message.
      shared: whether all processes call this together; each then reads its share of the files.

    Raises:
      UserError: naming the files that are missing, unexpected or damaged.
    """
    digests = read_digests(folder, accepted)
    chosen = sorted(digests.files) if names is None else list(names)
    wrong = [_describe(folder, name) for name in _find_damaged(folder, chosen, digests, shared)]
    if names is None:
        unknown = [name for name in _list_files(folder) if name not in digests.files]
        wrong += [f"{name} is not in {NAME}" for name in unknown]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise UserError(
            f"{folder} is not as {digests.written_by} wrote it: {', '.join(wrong[:_SHOWN])}{more}; "
            f"accepted: {accepted}"
        )
    return digests


def _find_damaged(folder: Path, names: Sequence[str], digests: Digests, shared: bool) -> list[str]:
    """The files that do not match; with `shared`, each process reads every n-th one."""
    index, count = (jax.process_index(), jax.process_count()) if shared else (0, 1)
    mine = names[index::count]
    damaged = np.zeros(len(names), bool)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _differs(folder / name, digests.files.get(name)), mine)
        damaged[index::count] = list(found)
    if shared:
        damaged = any_process(damaged)
    return [name for name, differs in zip(names, damaged, strict=True) if differs]


def _differs(file: Path, expected: str | None) -> bool:
    """Whether the digest differs, or the file cannot be read."""
    try:
        return not file.is_file() or _sha256(file) != expected
    except OSError:
        return True


def _describe(folder: Path, name: str) -> str:
    return f"{name} does not match {NAME}" if (folder / name).exists() else f"{name} is missing"


def _sha256(file: Path, sync: bool = False) -> str:
    with file.open("rb") as opened:  # hashing releases the GIL
        if sync:
            os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _list_files(folder: Path) -> list[str]:
    """Names of everything below a folder but directories and `digests.json`, sorted."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in found} - {NAME})


def _render(digests: Digests) -> str:
    """The text of `digests.json`, with the digest of the rest at its end."""
    fields = digests._asdict()
    seal = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps(fields | {"sha256": seal}, indent=2) + "\n"
