"""Index of a file of records: for each record its place, verdict, tokens and images.

A run needs the lengths of all records before the first step, to plan rows, but their texts and
images only when it reads them. The first use of a file parses and tokenizes every record once, in
processes, and writes

    FOLDER/columns.bin      one array after the other, memory-mapped at run time (`COLUMNS`)
    FOLDER/rejected.jsonl   line and reason of each record that breaks its form
    FOLDER/index.json       the identity of the file, counts, and digests of all three

A build that is interrupted continues with the blocks of records that it has finished.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from moddistill.data.indexing import COLUMNS, IndexSpec, index_records
from moddistill.data.places import Places
from moddistill.data.record_files import open_file
from moddistill.errors import UserError
from moddistill.storage.json_file import read_json, write_json

LOG = logging.getLogger("moddistill")
_SMALL = 2**20  # bytes of an index that is read instead of mapped
_RECENT = 2.0  # seconds; a file may change again without another time stamp


@dataclasses.dataclass(frozen=True)
class FileIndex:
    """The index of one file; arrays are memory-mapped, with an element for each record.

    Attributes:
      tokens: of the sample; 0 for a rejected record.
      needed: the shortest length that has all images and a supervised token.
      images: number of images.
      first_named: line of the first record with an image in a file of its own; 0 if there is none.
      digest: identifies the content of the file.
    """

    folder: Path
    places: Places
    tokens: np.ndarray
    needed: np.ndarray
    images: np.ndarray
    first_named: int
    digest: str

    def __len__(self) -> int:
        return len(self.tokens)

    def __reduce__(self):
        return _load, (self.folder,)  # maps the arrays again, where they would be copied

    def rejected(self) -> Iterator[tuple[int, str]]:
        """Yields line and reason of each record that breaks its form."""
        with (self.folder / "rejected.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                number, reason = json.loads(line)
                yield number, reason


def open_index(path: str, spec: IndexSpec, folder: str) -> FileIndex:
    """Opens the index of a file, and makes it if there is none of the file's present content.

    Args:
      folder: of indices; empty for `.index` next to the file.

    Raises:
      UserError: the file is not one of records, or the index cannot be written.
    """
    target = index_folder(path, spec, folder)
    if not _is_current(target, path):
        try:
            with _locked(target):
                if not _is_current(target, path):  # another run may have made it meanwhile
                    _build(path, spec, target)
        except OSError as error:
            raise UserError(
                f"{target}: expected a folder for the index of {path}, which "
                f"--config.data.index=FOLDER changes, got {error.strerror}"
            ) from error
    return _load(target)


def index_folder(path: str, spec: IndexSpec, folder: str) -> Path:
    """Returns the folder of the index of a file."""
    file = Path(path).resolve()
    if not folder:
        return file.parent / ".index" / file.name / spec.key
    place = hashlib.sha256(str(file.parent).encode()).hexdigest()[:8]
    return Path(folder) / f"{file.name}.{place}" / spec.key


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Waits for other processes that make the same index."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _load(folder: Path) -> FileIndex:
    meta = read_json(folder / "index.json")
    count = meta["records"]
    file, size = folder / "columns.bin", count * COLUMNS.itemsize
    # A mapped file has a descriptor of its own, of which thousands of small shards would need more
    # than a process has.
    content = np.memmap(file, np.uint8, "r") if size > _SMALL else np.fromfile(file, np.uint8)
    columns, start = {}, 0
    for name in COLUMNS.names:
        end = start + count * COLUMNS[name].itemsize
        columns[name] = content[start:end].view(COLUMNS[name])
        start = end
    places = Places(columns.pop("offset"), columns.pop("size"), columns.pop("line"))
    named = {"first_named": meta["first_named"], "digest": meta["file"]["sha256"]}
    return FileIndex(folder=folder, places=places, **columns, **named)


# Identity of a file: if its size and times are those of the index, so is its content. If only the
# times differ, as after a copy, the digest decides. The change time cannot be set back by programs.


def _stamp(path: str) -> dict[str, int]:
    status = os.stat(path)
    return {"size": status.st_size, "mtime": status.st_mtime_ns, "ctime": status.st_ctime_ns}


def _is_current(folder: Path, path: str) -> bool:
    if not folder.is_dir():
        return False
    meta, stamp = _read_meta(folder), _stamp(path)
    if meta is None:
        LOG.warning("%s is damaged and made again", folder)
        return False
    known = dict(meta["file"])
    digest, checked = known.pop("sha256"), known.pop("checked")
    settled = checked - max(stamp["mtime"], stamp["ctime"]) > _RECENT * 1e9
    if known == stamp and settled:
        return True
    if known["size"] != stamp["size"] or _digest(path) != digest:
        return False
    _write_meta(folder, meta | {"file": _identity(path, digest)})
    return True


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """Returns `index.json`; None if it or the columns are damaged."""
    try:
        meta = read_json(folder / "index.json")
        size = meta["records"] * COLUMNS.itemsize
        intact = (folder / "columns.bin").stat().st_size == size
        intact = intact and _digests(folder) == meta["digests"] and meta.pop("own") == _own(meta)
    except (UserError, OSError, KeyError, TypeError):
        return None
    return meta if intact else None


def _identity(path: str, digest: str) -> dict[str, Any]:
    return _stamp(path) | {"sha256": digest, "checked": time.time_ns()}


def _digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(folder: Path) -> dict[str, str]:
    return {name: _digest(folder / name) for name in ("columns.bin", "rejected.jsonl")}


def _own(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    try:
        write_json(folder / "index.json", meta | {"own": _own(meta)})
    except OSError:
        return  # a folder that others own: the digest is compared again next time


def _read_begun(file: Path) -> Any:
    try:
        return read_json(file)
    except UserError:
        return None


def _build(path: str, spec: IndexSpec, target: Path) -> None:
    before = _stamp(path)
    building = target.with_name(f"{target.name}.partial")
    begun = building / "begun.json"
    if building.is_dir() and _read_begun(begun) != before:
        shutil.rmtree(building)  # of another content
    building.mkdir(parents=True, exist_ok=True)
    write_json(begun, before)
    with ThreadPoolExecutor(1) as hashing:
        digest = hashing.submit(_digest, path)
        meta = index_records(open_file(path), spec, building)
        meta["file"] = _identity(path, digest.result())
        meta["digests"] = _digests(building)
    if before.items() - meta["file"].items():
        raise UserError(f"{path}: expected a file that does not change while it is indexed")
    write_json(building / "index.json", meta | {"own": _own(meta)})
    begun.unlink()
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
