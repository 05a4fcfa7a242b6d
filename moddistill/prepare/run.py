"""A conversion: shards made by a pool of processes, their rejected records and digests.

    DIR/prepare.json                    flags, inputs and, at the end, counts
    DIR/00000-of-00012.array_record     a shard, when it is complete
    DIR/rejected.jsonl                  file, line and reason of the records that are in no shard
    DIR/digests.json                    SHA-256 of all files, written last
    DIR/.work                           everything unfinished

An interrupted conversion continues with the shards that are missing, and the result has the same
bytes. What a shard contains depends on the flags and inputs only, so those may not change.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moddistill import __version__
from moddistill.data.quarantine import Quarantine, Rejected
from moddistill.data.reasons import Reasons
from moddistill.data.worker_pool import worker_pool
from moddistill.errors import UserError
from moddistill.prepare.convert import Converter
from moddistill.prepare.inputs import InputSpec
from moddistill.prepare.packagings import open_input
from moddistill.prepare.shards import Shard, ShardWriter, list_pieces, records_per_shard, split
from moddistill.storage.digests import NAME, check_outside, verify, write_digests
from moddistill.storage.json_file import read_json, write_json

REJECTED = "rejected.jsonl"
_SETTINGS, _WORK = "prepare.json", ".work"
_LARGEST_COUNTS = 2**30  # bytes of the file with the rejected records of a shard
_SHOWN_REASONS = 10


def prepare(spec: InputSpec, folder: Path, workers: int) -> dict[str, Any]:
    """Converts published data to ArrayRecord shards, or continues to.

    Args:
      spec: the input, and which of its records are converted.
      folder: of the shards.
      workers: processes; 0 converts in this one.

    Returns:
      Numbers of `records`, `usable`, `rejected`, `left_out`, `images`, `bytes` and `shards`, and
      `reasons`: the number of records and an example of each kind of reason.

    Raises:
      UserError: the input cannot be read, or the folder has other files or is of other flags or
        inputs.
    """
    _check_free(folder)
    with _locked(folder / _WORK) as work:
        opened = open_input(spec, work)
        settings = _settings(spec, opened.paths)
        saved = read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}
        _check_same(folder, saved, settings)
        if "counts" not in saved:
            converter = Converter(opened.images, spec.leave_out, spec.columns)
            pieces = list_pieces(opened.records)
            size = saved.get("records_per_shard") or records_per_shard(pieces, converter)
            saved = settings | {"records_per_shard": size}
            write_json(folder / _SETTINGS, saved)
            shards, writer = split(pieces, size), ShardWriter(converter, folder, work)
            _write(writer, shards, workers)
            saved["counts"] = _collect(writer, shards, folder / REJECTED)
            write_json(folder / _SETTINGS, saved)
        shutil.rmtree(work)
        if (folder / NAME).is_file():
            verify(folder)
        else:
            write_digests(folder, "prepare")
    return saved["counts"]


def _check_free(folder: Path) -> None:
    check_outside(folder, "--to")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to: expected a folder, got the file {str(folder)!r}")
    found = sorted({path.name for path in folder.iterdir()} if folder.is_dir() else ())
    if found and _SETTINGS not in found and found != [_WORK]:
        raise UserError(
            f"--to: expected an empty folder or one that prepare made, got {str(folder)!r} with "
            f"{found[0]!r}"
        )


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[Path]:
    """Makes the work folder, which one run at a time may use."""
    work.mkdir(parents=True, exist_ok=True)
    folder = work.parent
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--to: expected a folder that no other run writes to, got {str(folder)!r}"
            ) from None
        try:
            yield work
        finally:
            if not (folder / _SETTINGS).exists():  # an input that could not be opened
                shutil.rmtree(work)
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()


def _settings(spec: InputSpec, paths: Sequence[str]) -> dict[str, Any]:
    """Returns the flags, and size and time of all inputs, as they are in JSON."""
    status = {path: os.stat(path) for path in paths}
    settings = {
        "version": __version__,
        "flags": dataclasses.asdict(spec),
        "inputs": {path: [each.st_size, each.st_mtime_ns] for path, each in status.items()},
    }
    return json.loads(json.dumps(settings))


def _check_same(folder: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises UserError if a folder was begun from other flags or inputs."""
    old, new = (each["flags"] | each for each in (saved or settings, settings))
    changed = [name for name in new if name != "flags" and old.get(name) != new[name]]
    if changed:
        raise UserError(
            f"--to: expected a folder begun with the same {', '.join(changed)}, got {str(folder)!r}"
        )


def _write(writer: ShardWriter, shards: Sequence[Shard], workers: int) -> None:
    """Writes the shards that are missing, with a progress bar."""
    missing = [shard for shard in shards if not writer.is_written(shard)]
    total, left = sum(map(len, shards)), sum(map(len, missing))
    with tqdm(total=total, initial=total - left, unit=" records", smoothing=0.1) as bar:
        if not workers or not missing:
            for shard in missing:
                bar.update(writer(shard))
            return
        with worker_pool(min(workers, len(missing))) as pool:
            for future in as_completed([pool.submit(writer, shard) for shard in missing]):
                bar.update(future.result())


def _collect(writer: ShardWriter, shards: Sequence[Shard], path: Path) -> dict[str, Any]:
    """Writes the list of rejected records, and returns the counts of all shards."""
    counts = dict.fromkeys(("records", "usable", "rejected", "left_out", "images", "bytes"), 0)
    quarantine, reasons = Quarantine(str(path)), Reasons()
    for shard in shards:
        found = read_json(writer.counts_file(shard), _LARGEST_COUNTS)
        rejected = [Rejected(*each) for each in found.pop("rejected")]
        quarantine.add(rejected)
        for each in rejected:
            reasons.add(each)
        for name, count in (found | {"rejected": len(rejected)}).items():
            counts[name] += count
    return counts | {"shards": len(shards), "reasons": reasons.commonest(_SHOWN_REASONS)}
