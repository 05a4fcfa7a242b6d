"""WebDataset: tar shards in which the files of a sample follow each other and have one key.

The key is the name up to the first dot of its last part; the rest is the extension. Of a sample

    KEY.json            is its record, in any published form
    KEY.txt             is a caption, if there is no record; the question is a flag
    KEY.jpg, KEY.1.png  are its images, in the order of their numbers, or in that of their names in
                        the record, which must name all of them if there are several

Other files (`.cls`, `.url`, `.npy`, ...), and names without key or extension, are not read.
"""

import dataclasses
import io
import os
import re
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any

from moddistill.data.content import CONVERSATION_FIELDS, IMAGE_FIELDS
from moddistill.data.places import Places, in_blocks
from moddistill.data.records import IMAGE
from moddistill.errors import UserError, invalid
from moddistill.prepare.archives import FAULTS, LARGEST_IMAGE, normalize
from moddistill.prepare.inputs import value_or_error
from moddistill.prepare.tar_members import check_uncompressed, read_headers
from moddistill.storage.json_file import parse

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_LARGEST_SAMPLE = 2 * LARGEST_IMAGE  # bytes
_NUMBER = re.compile(r"\d{0,18}")  # of an image in its sample


@dataclasses.dataclass(frozen=True)
class WebDatasetRecords:
    """The samples of a tar shard. A place is the byte range of a sample.

    Attributes:
      name: path of the tar.
      question: of captions.
    """

    name: str
    question: str = ""

    def places(self) -> Iterator[Places]:
        with open(self.name, "rb") as file:
            check_uncompressed(file, self.name)
            yield from in_blocks(self._samples(file))

    def _samples(self, file: BufferedIOBase) -> Iterator[tuple[int, int, int]]:
        """Yields offset, size and number of the samples."""
        key, begin, end, number = "", 0, 0, 0
        for each in read_headers(file, self.name):
            member_key, extension = split_name(each.member.name)
            if not extension:
                continue
            if member_key != key:
                if number:
                    yield begin, end - begin, number
                key, begin, number = member_key, each.start, number + 1
            end = each.end
        if number:
            yield begin, end - begin, number

    def fields(self, places: Places) -> Iterator[Any]:
        with open(self.name, "rb") as file:
            for offset, size in zip(*places[:2], strict=True):
                yield value_or_error(self._read, file.fileno(), int(offset), int(size))

    def _read(self, descriptor: int, offset: int, size: int) -> dict[str, Any]:
        if size > _LARGEST_SAMPLE:
            raise invalid("bytes of the sample", size, f"<= {_LARGEST_SAMPLE:,}")
        key, files = _files(os.pread(descriptor, size, offset), self.name)
        record = parse(files["json"], f"{key}.json") if "json" in files else {}
        if not isinstance(record, dict):
            raise invalid(f"{key}.json", record, "a JSON object")
        found = {
            f"{key}.{extension}": data
            for extension, data in files.items()
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS
        }
        images = [{"path": path, "bytes": found[path]} for path in _order(key, list(found), record)]
        if "txt" in files:
            record = self._caption(key, record, files["txt"], len(images))
        named = {name: value for name, value in record.items() if name not in IMAGE_FIELDS}
        return {"id": key} | (named | {"images": images} if images else record)

    def _caption(
        self, key: str, metadata: dict[str, Any], text: bytes, image_count: int
    ) -> dict[str, Any]:
        """Returns a record of one turn; `metadata` is what a downloader notes about an image."""
        if any(name in metadata for name in (*CONVERSATION_FIELDS, "chosen")):
            raise UserError(f"{key}: expected a record in .json or a caption in .txt, got both")
        try:
            answer = text.decode().strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{key}.txt: expected UTF-8 text, got {error.reason}") from None
        question = "\n".join([IMAGE] * image_count + [self.question] * bool(self.question))
        if not image_count:
            raise UserError(f"{key}.txt: expected an image next to the caption, got none")
        turns = (("human", question), ("gpt", answer))
        return {"conversations": [{"from": role, "value": value} for role, value in turns]}


def _order(key: str, paths: list[str], record: dict[str, Any]) -> list[str]:
    """Returns the images of a sample in the order in which its text has them."""
    values = [record.get(name) or [] for name in IMAGE_FIELDS]
    named = [
        name
        for value in values
        for name in (value if isinstance(value, list) else [value])
        if isinstance(name, str)
    ]
    if not paths or len(paths) == len(named) == 1:
        return paths
    if named:
        of_name = {os.path.basename(path).lower(): path for path in paths}
        wanted = [os.path.basename(name).lower() for name in named]
        if sorted(wanted) != sorted(of_name):
            raise invalid(f"images of {key}", named, f"names of the files of the sample, {paths}")
        return [of_name[name] for name in wanted]
    numbers = {path: path[len(key) + 1 :].rpartition(".")[0] for path in paths}
    if not all(_NUMBER.fullmatch(number) for number in numbers.values()):
        raise invalid(
            f"images of {key}", paths, "names with a number, or a record that names the images"
        )
    return sorted(paths, key=lambda path: int(numbers[path] or -1))


def split_name(name: str) -> tuple[str, str]:
    """Returns key and extension of a file in a shard; both are empty if one is.

    >>> split_name("train/0001.left.JPG")
    ('train/0001', 'left.jpg')
    """
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else ("", "")


def _files(data: bytes, origin: str) -> tuple[str, dict[str, bytes]]:
    """Returns the key of a sample and its files by extension."""
    key, files = "", {}
    for each in read_headers(io.BytesIO(data), origin):
        member = each.member
        if not split_name(member.name)[1]:
            continue
        key, extension = split_name(normalize(member.name))
        if member.fault:
            raise UserError(f"{member.name}: expected a plain file, got {FAULTS[member.fault]}")
        if extension in files:
            raise UserError(f"{key}: expected one file .{extension}, got several")
        files[extension] = data[member.offset : member.offset + member.size]
    return key, files
