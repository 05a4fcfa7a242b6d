"""SHA-256 digests of the files of a folder, by which readers find damaged files.

`digests.json` is written after all other files:

    {"written_by": "import", "files": {"model.json": "5f0c...", ...}, "sha256": "98ea..."}

Names are relative to the folder. The last digest covers the rest of `digests.json` itself, whose
bytes are a function of its content: a changed bit anywhere in the folder is found.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import jax
import numpy as np

from moddistill.distributed.processes import any_process
from moddistill.errors import UserError
from moddistill.storage.text_file import replace_text

NAME = "digests.json"
UNDAMAGED = "an undamaged folder"
_LARGEST_FILE = 16 * 2**20  # bytes; a file of 100,000 names has 12 MB
_MOST_SHOWN = 3  # file names in an error


class Digests(NamedTuple):
    """The content of `digests.json`: the command that wrote the folder, and `{name: hex}`."""

    written_by: str
    files: dict[str, str]


def write_digests(folder: Path, written_by: str) -> None:
    """Writes `digests.json` of all files below a folder, after forcing them to the disk."""
    names = _list_files(folder)
    # fsync comes first: after a power failure, no digest may vouch for a file that the disk lacks.
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda name: _sha256(folder / name, sync=True), names)
        digests = Digests(written_by, dict(zip(names, hashes, strict=True)))
    replace_text(folder / NAME, _render(digests))


def read_digests(folder: Path, expected: str = UNDAMAGED) -> Digests:
    """Reads `digests.json`; UserError if it is missing or damaged.

    Args:
      expected: what the message asks for.
    """
    file = folder / NAME
    if not file.is_file():
        raise UserError(f"{folder}: expected {expected}, got one without {NAME}")
    with file.open("rb") as opened:
        content = opened.read(_LARGEST_FILE + 1)
    digests = _parse(content) if len(content) <= _LARGEST_FILE else None
    if digests is None:
        raise UserError(f"{folder}: expected {expected}, got one whose {NAME} has another sha256")
    return digests


def fingerprint(folder: Path) -> str:
    """Returns the digest of `digests.json`, which identifies the content of all files."""
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
    """Parses `digests.json`; None if it is damaged or names a file outside of its folder."""
    try:
        fields = json.loads(content)
        digests = Digests(fields["written_by"], dict(fields["files"]))
        # `_render` is deterministic, so comparing bytes also checks the digest of the file itself.
        intact = _render(digests).encode() == content
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    names = map(PurePosixPath, digests.files)
    confined = all(not name.is_absolute() and ".." not in name.parts for name in names)
    return digests if intact and confined else None


def content_digest(folder: Path) -> str:
    """Returns a digest of the names and contents of a folder's files, hidden ones left out."""
    hidden = re.compile(r"(^|/)\.")
    names = [x for x in _list_files(folder) if not hidden.search(x) and (folder / x).is_file()]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _sha256(folder / name), names)
        lines = [f"{name} {digest}\n" for name, digest in zip(names, found, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def verify(
    folder: Path,
    names: Sequence[str] | None = None,
    *,
    expected: str = UNDAMAGED,
    shared: bool = False,
) -> Digests:
    """Compares files with `digests.json`, and returns its content.

    Args:
      names: the files to compare; by default all files of the folder, and then a file that is not
        in `digests.json` is an error too.
      expected: what the message asks for.
      shared: whether all processes call this together; each then reads its share of the files.

    Raises:
      UserError: naming the files that are missing, unexpected or damaged.
    """
    digests = read_digests(folder, expected)
    compared = sorted(digests.files) if names is None else list(names)
    wrong = [_describe(folder, name) for name in _find_damaged(folder, compared, digests, shared)]
    if names is None:
        unknown = [name for name in _list_files(folder) if name not in digests.files]
        wrong += [f"{name} is not in {NAME}" for name in unknown]
    if wrong:
        more = f" and {len(wrong) - _MOST_SHOWN} more" if len(wrong) > _MOST_SHOWN else ""
        raise UserError(
            f"{folder}: expected {expected}, got one changed since {digests.written_by} wrote it: "
            f"{', '.join(wrong[:_MOST_SHOWN])}{more}"
        )
    return digests


def _find_damaged(folder: Path, names: Sequence[str], digests: Digests, shared: bool) -> list[str]:
    """Returns the files that do not match.

    With `shared`, process i of n reads every n-th file from i on, and all learn of every damage.
    """
    index, count = (jax.process_index(), jax.process_count()) if shared else (0, 1)
    local = names[index::count]
    damaged = np.zeros(len(names), bool)
    with ThreadPoolExecutor() as pool:
        differs = pool.map(lambda name: _differs(folder / name, digests.files.get(name)), local)
        damaged[index::count] = list(differs)
    if shared:
        # One collective for all files; a process that has read none must join it too.
        damaged = any_process(damaged)
    return [name for name, is_damaged in zip(names, damaged, strict=True) if is_damaged]


def _differs(file: Path, expected: str | None) -> bool:
    """Returns whether the digest differs or the file cannot be read."""
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
    """Returns the sorted names of all files and links below a folder except `digests.json`."""
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in files} - {NAME})


def _render(digests: Digests) -> str:
    """Returns the text of `digests.json`, which ends with the digest of the rest."""
    fields = digests._asdict()
    seal = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps(fields | {"sha256": seal}, indent=2) + "\n"
