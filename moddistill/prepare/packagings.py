"""The published packagings that a conversion reads, by the name of their form."""

import os
from pathlib import Path

from moddistill.prepare.archive_input import open_archives
from moddistill.prepare.downloads import DOWNLOADS, open_download
from moddistill.prepare.image_store import ImageStore, open_places, parse_images
from moddistill.prepare.inputs import FileRecords, Input, InputSpec, find_files
from moddistill.prepare.parquet_rows import ParquetRecords
from moddistill.prepare.tsv import TsvRecords
from moddistill.prepare.webdataset import WebDatasetRecords

# Files of records next to folders or archives of images, or with images inside.
_FILES = {
    "json": ((".json", ".jsonl"), lambda path, _: FileRecords(path, path)),
    "parquet": ((".parquet",), lambda path, _: ParquetRecords(path)),
    "webdataset": ((".tar",), lambda path, spec: WebDatasetRecords(path, spec.question)),
    "tsv": ((".tsv",), lambda path, _: TsvRecords(path)),
}
FORMS = (*_FILES, "zip", "tar", *DOWNLOADS)


def open_input(spec: InputSpec, work: Path) -> Input:
    """Opens the input of a conversion.

    Args:
      spec: with one of `FORMS`.
      work: folder of the indices of archives, while they are used.

    Raises:
      UserError: a file is missing or damaged.
    """
    if spec.form in DOWNLOADS:
        return open_download(spec, work)
    if spec.form not in _FILES:
        return open_archives(spec, work)
    suffixes, open_file = _FILES[spec.form]
    files = find_files(spec.sources, suffixes)
    flags = parse_images(spec.images)
    places, _ = open_places(flags, work)
    archives = [path for _, path in flags if os.path.isfile(path)]
    return Input([open_file(path, spec) for path in files], ImageStore(places), files + archives)
