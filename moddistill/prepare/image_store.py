"""Images by the names that records give them, in folders and archives.

A place serves the names below its prefix. LLaVA-like data sets name `coco/train2017/1.jpg`, which
is `train2017/1.jpg` in the archive of COCO:

    --images coco=train2017.zip --images vg=images.zip --images vg=images2.zip --images other_folder
"""

import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from moddistill.data.image_files import EmbeddedImage, ImageFile, read_bytes
from moddistill.errors import invalid
from moddistill.prepare.archives import LARGEST_IMAGE, index_archive, normalize, open_archive
from moddistill.prepare.tar_members import list_tar
from moddistill.prepare.zip_members import list_zip

LISTINGS = {".zip": list_zip, ".tar": list_tar}


class Place(NamedTuple):
    """A folder or an archive of images.

    Attributes:
      prefix: of the names that are looked up here, which is removed from them; may be empty.
      index: file of an archive's index; empty for a folder.
      inside: folder of the archive that names are relative to.
    """

    prefix: str
    path: str
    index: str = ""
    inside: str = ""


class ImageStore:
    """Images by name; picklable, so that processes share the indices of archives.

    Args:
      places: searched from the longest prefix to the shortest, equal ones in their order.
    """

    def __init__(self, places: Iterable[Place] = ()):
        self.places = sorted(places, key=lambda place: -len(place.prefix))

    def read(self, name: str) -> EmbeddedImage:
        """Returns the image of a name in a record.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        path = normalize(name)
        for place in self.places:
            data = _read(place, path)
            if data is not None:
                return EmbeddedImage(name, data)
        searched = ", ".join(dict.fromkeys(place.path for place in self.places))
        raise invalid("image", name, f"a file in {searched or 'one of --images, which is absent'}")


def _read(place: Place, path: str) -> bytes | None:
    """Returns the content of a file; None if the place has no such file."""
    if place.prefix and not is_below(path, (place.prefix,)):
        return None
    below = path.removeprefix(f"{place.prefix}/") if place.prefix else path
    if not place.index:
        if not os.path.lexists(os.path.join(place.path, below)):
            return None
        return read_bytes(ImageFile(place.path, below), LARGEST_IMAGE)
    archive = open_archive(place.path, place.index)
    # Some archives of a folder have it in their names, and some have only what is below it.
    for candidate in dict.fromkeys((below, path)):
        member = archive.find(place.inside + candidate)
        if member is not None:
            return archive.read(member)
    return None


def is_below(name: str, prefixes: Iterable[str]) -> bool:
    """Returns whether a name is that of a file in one of the folders `prefixes`."""
    return name.removeprefix("./").startswith(tuple(f"{prefix}/" for prefix in prefixes))


def parse_images(flags: Sequence[str]) -> list[tuple[str, str]]:
    """Returns (prefix, path) of each value of `--images`, PATH or PREFIX=PATH.

    Raises:
      UserError: a path is neither a folder nor an archive.
    """
    places = []
    for flag in flags:
        # A path may contain `=` itself.
        prefix, _, path = ("", "", flag) if os.path.exists(flag) else flag.partition("=")
        if not os.path.isdir(path) and not (os.path.isfile(path) and is_archive(path)):
            raise invalid("--images", flag, "PATH or PREFIX=PATH of a folder, .zip or .tar")
        places.append((prefix and normalize(prefix), path))
    return places


def is_archive(path: str) -> bool:
    """Returns whether a file is an archive by its name."""
    return os.path.splitext(path)[1].lower() in LISTINGS


def open_places(
    places: Iterable[tuple[str, str]], work: Path
) -> tuple[list[Place], dict[str, list[str]]]:
    """Makes the indices of archives.

    Args:
      places: prefix and path of each.
      work: folder of the indices.

    Returns:
      The places, and the names of the `.json` and `.jsonl` members of each archive.
    """
    opened, records, indices = [], {}, {}
    for prefix, path in places:
        if not os.path.isdir(path) and path not in indices:
            # A name of its own: `open_archive` saves archives by the name of their index.
            indices[path] = work / f"index-{secrets.token_hex(4)}.npy"
            list_members = LISTINGS[os.path.splitext(path)[1].lower()]
            records[path] = index_archive(list_members(path), indices[path])
        opened.append(Place(prefix, path, str(indices.get(path, ""))))
    return opened, records
