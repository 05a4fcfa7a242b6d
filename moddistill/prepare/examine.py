"""Numbers of consecutive records, read as training reads them: images are decoded."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from moddistill.config import ColumnsConfig
from moddistill.data.examples import TokenCounts, count_tokens
from moddistill.data.forms import parse_record
from moddistill.data.image_decoding import ImageRules, decode, read_header
from moddistill.data.image_files import EmbeddedImage, ImageFile, read_bytes
from moddistill.data.quarantine import Rejected
from moddistill.data.records import AnyRecord, PreferencePair
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError, invalid
from moddistill.prepare.convert import record_fields, record_kind
from moddistill.prepare.shards import Piece

_AT_ONE_TIME = 256  # records in memory
RECORD = np.dtype(
    [
        ("digest", "<u8"), ("is_usable", "?"), ("is_pair", "?"), ("turns", "<u2"),
        ("images", "<u2"), ("tokens", "<u4"), ("needed", "<u4"),
    ]
)  # fmt: skip
IMAGE = np.dtype(
    [
        ("digest", "<u8"), ("record", "<u4"), ("width", "<u4"), ("height", "<u4"),
        ("bytes", "<u4"), ("format", "S4"),
    ]
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExamineSpec:
    """How records are read.

    Attributes:
      images: folder of image names; empty without one.
      tokenizer: None if lengths are not counted.
      image_tokens: patches of an image.
    """

    images: str
    columns: ColumnsConfig
    rules: ImageRules
    tokenizer: Tokenizer | None = None
    template: str = "vicuna"
    image_tokens: int = 0


class Numbers(NamedTuple):
    """Numbers of records, and of the images of those that are usable.

    Attributes:
      records: `RECORD` [N].
      images: `IMAGE` [I]; `record` is the number of the image's record, from 0.
      rejected: the records that are not usable.
    """

    records: np.ndarray
    images: np.ndarray
    rejected: list[Rejected]


def examine(piece: Piece, spec: ExamineSpec) -> Numbers:
    """Reads records and their images once; memory does not grow with their number."""
    items, parts = iter(piece), []
    while part := list(itertools.islice(items, _AT_ONE_TIME)):
        parts.append(_examine(part, spec))
    return merge(parts)


def merge(parts: Iterable[Numbers]) -> Numbers:
    """Returns the numbers of records that follow each other."""
    records, images, rejected = [np.zeros(0, RECORD)], [np.zeros(0, IMAGE)], []
    count = 0
    for part in parts:
        part.images["record"] += count
        count += len(part.records)
        records.append(part.records)
        images.append(part.images)
        rejected += part.rejected
    return Numbers(np.concatenate(records), np.concatenate(images), rejected)


def _examine(items: Sequence[tuple[str, int, Any]], spec: ExamineSpec) -> Numbers:
    rows = np.zeros(len(items), RECORD)
    images, rejected = [], []
    for number, (file, line, fields) in enumerate(items):
        try:
            record, found = _read(fields, file, line, spec)
            counts = _token_counts(record, spec)
        except UserError as error:
            rejected.append(Rejected(file, line, str(error)))
            continue
        rows[number] = _row(record, [digest for digest, *_ in found])
        rows["tokens"][number], rows["needed"][number] = counts
        images += [(digest, number, *rest) for digest, *rest in found]
    return Numbers(rows, np.array(images, IMAGE), rejected)


def _read(
    fields: Any, file: str, line: int, spec: ExamineSpec
) -> tuple[AnyRecord, list[tuple[Any, ...]]]:
    """Returns a record without the bytes of its images, and digest, sizes and format of these."""
    if isinstance(fields, UserError):
        raise fields
    try:
        record = parse_record(
            fields,
            kind=record_kind(fields),
            file=file,
            line=line,
            image_root=spec.images,
            columns=spec.columns,
        )
    except RecursionError:  # of the `repr` in an error message
        raise UserError("record: expected a few levels, got deeply nested values") from None
    found = [_image(image, spec) for image in record.images]
    names = tuple(EmbeddedImage(image.name, b"") for image in record.images)
    return dataclasses.replace(record, images=names), found


def _image(image: ImageFile | EmbeddedImage, spec: ExamineSpec) -> tuple[Any, ...]:
    if isinstance(image, ImageFile) and not spec.images:
        raise invalid("image", image.name, "bytes inside of the record, or a folder by --images")
    data = read_bytes(image, spec.rules.max_bytes)
    header = read_header(data, spec.rules, str(image))
    decode(data, spec.rules, str(image))
    return _hash(data), header.width, header.height, len(data), header.format


def _row(record: AnyRecord, images: list[int]) -> tuple[Any, ...]:
    """Returns the `RECORD` of a record; its digest is that of texts and images, not of its id."""
    fields = record_fields(record) | {"id": "", "images": images}
    is_pair = isinstance(record, PreferencePair)
    turns = len(record.history) + 1 if is_pair else len(record.turns)
    most = np.iinfo(np.uint16).max
    digest = _hash(json.dumps(fields).encode())
    return digest, True, is_pair, min(turns, most), min(len(images), most), 0, 0


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _token_counts(record: AnyRecord, spec: ExamineSpec) -> TokenCounts:
    if spec.tokenizer is None:
        return TokenCounts(0, 0)
    return count_tokens(record, spec.template, spec.tokenizer, spec.image_tokens)
