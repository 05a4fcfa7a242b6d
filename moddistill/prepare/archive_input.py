"""Zip and tar archives of images, with the files of records inside or outside."""

import fnmatch
import os
import posixpath
from pathlib import Path

from moddistill.errors import UserError
from moddistill.prepare.archives import open_archive
from moddistill.prepare.image_store import ImageStore, Place, open_places, parse_images
from moddistill.prepare.inputs import FileRecords, Input, InputSpec, find_files

_LARGEST_RECORDS = 64 * 2**30  # bytes of a file of records
_LARGEST_RATIO = 200  # of its size to that in the archive; that of text is about 10


def open_archives(spec: InputSpec, work: Path) -> Input:
    """Opens archives of one kind, zip or tar.

    Files of records inside are those that `--records` matches, by default all `.json` and `.jsonl`
    members. Image names are relative to the archives, or to the folder of the records.

    Raises:
      UserError: an archive is damaged, or there is no file of records.
    """
    archives = find_files(spec.sources, (f".{spec.form}",))
    flags = [("", archive) for archive in archives] + parse_images(spec.images)
    places, members = open_places(flags, work)
    records, outside = [], []
    for place in places[: len(archives)]:
        for name in fnmatch.filter(members[place.path], spec.records or "*"):
            records.append(_copy(place, name, work / f"records-{len(records)}"))
            if folder := posixpath.dirname(name):
                places.append(place._replace(inside=f"{folder}/"))
    if not records and spec.records:
        outside = find_files([spec.records], (".json", ".jsonl"))
        records = [FileRecords(path, path) for path in outside]
    if not records:
        raise UserError(
            f"{', '.join(archives)}: expected a .json or .jsonl member, or --records=FILE, got none"
        )
    return Input(records, ImageStore(places), [path for _, path in flags] + outside)


def _copy(place: Place, name: str, folder: Path) -> FileRecords:
    """Copies a file of records out of an archive, since its records are read in any order."""
    archive = open_archive(place.path, place.index)
    member = archive.find(name)
    if member.size > min(_LARGEST_RECORDS, _LARGEST_RATIO * member.stored + 2**20):
        raise UserError(
            f"{name} in {place.path}: expected records of at most {_LARGEST_RECORDS:,} bytes and "
            f"{_LARGEST_RATIO} times their compressed size, got {member.size:,} bytes"
        )
    folder.mkdir(exist_ok=True)
    # The name is that of the member only in its ending, by which the format is known.
    path = folder / f"records{os.path.splitext(name)[1].lower()}"
    with path.open("wb") as file:
        for piece in archive.pieces(member):
            file.write(piece)
    return FileRecords(f"{place.path}/{name}", str(path))
