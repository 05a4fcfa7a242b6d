"""Folders of downloads: files of LLaVA records whose images are in an archive for each prefix.

The records name `llava_image_tune/coco/train2017/1.jpg`; `llava_image_tune` is a folder of the
download, or a zip of the folder that has not been unpacked.
"""

import logging
import os
from pathlib import Path
from typing import NamedTuple

from moddistill.prepare.image_store import ImageStore, open_places, parse_images
from moddistill.prepare.inputs import FileRecords, Input, InputSpec, find_files

LOG = logging.getLogger("moddistill")


class Download(NamedTuple):
    """A published folder.

    Attributes:
      records: pattern of its files of records.
      images: prefixes of image names, and the archive that each is published as, if it is one.
    """

    records: str
    images: dict[str, str]


DOWNLOADS = {
    # LanguageBind/MoE-LLaVA
    "moe-llava": Download(
        "train_json/*.json",
        {
            "llava_image": "llava_image.zip",
            "llava_image_tune": "llava_image_tune.zip",
            "lrv_tune": "lrv_tune.zip",
            "lvis_tune": "lvis_tune.zip",
            "svit_tune": "svit_tune.zip",
            "mimicit_tune": "mimicit_tune/LA.zip",
        },
    ),
    # mtgv/MobileVLM_V2_FT_Mix2M, whose images are those of other data sets
    "mobilevlm": Download(
        "MobileVLM_V2_FT_Mix2M.json",
        dict.fromkeys(
            (
                "coco", "gqa", "iconqa_data", "ocr_vqa", "sam", "SBU", "ScienceQA",
                "share_textvqa", "textvqa", "vg", "web-celebrity", "web-landmark", "wikiart",
            ),
            "",
        ),
    ),
}  # fmt: skip


def open_download(spec: InputSpec, work: Path) -> Input:
    """Opens a folder of downloads, or files of records with `--images`.

    Raises:
      UserError: there is no file of records.
    """
    download = DOWNLOADS[spec.form]
    folders = [source for source in spec.sources if os.path.isdir(source)]
    patterns = [source for source in spec.sources if source not in folders]
    patterns += [os.path.join(folder, spec.records or download.records) for folder in folders]
    files = find_files(patterns, (".json", ".jsonl"))
    flags = parse_images(spec.images)
    for folder in folders:
        paths = {prefix: os.path.join(folder, name) for prefix, name in download.images.items()}
        flags += [(prefix, path) for prefix, path in paths.items() if os.path.isfile(path)]
        flags.append(("", folder))
    _warn_missing(download, folders, [prefix for prefix, _ in flags])
    places, _ = open_places(flags, work)
    archives = [path for _, path in flags if os.path.isfile(path)]
    return Input([FileRecords(file, file) for file in files], ImageStore(places), files + archives)


def _warn_missing(download: Download, folders: list[str], found: list[str]) -> None:
    missing = [
        prefix
        for prefix in download.images
        if prefix not in found
        and not any(os.path.isdir(os.path.join(folder, prefix)) for folder in folders)
    ]
    if missing:
        LOG.warning(
            "no images for names below %s: their records are rejected without --images PREFIX=PATH",
            ", ".join(missing),
        )
