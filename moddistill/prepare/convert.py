"""One published record to the fields and images of an ArrayRecord.

The fields are the same for all forms: `id`, `conversations` and, of a pair, `chosen` and
`rejected`. Training reads them as it reads the published record.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from moddistill.config import ColumnsConfig
from moddistill.data.array_records import pack_record
from moddistill.data.forms import NO_COLUMNS, parse_record
from moddistill.data.image_decoding import ImageHeader, ImageRules, read_header
from moddistill.data.image_files import EmbeddedImage
from moddistill.data.images import PAD_COLOR
from moddistill.data.records import PreferencePair, Record
from moddistill.prepare.image_store import ImageStore, is_below

# The limit of pixels is one of the run that decodes the images.
_RULES = ImageRules(max_pixels=2**30, pad_color=PAD_COLOR)


class Converted(NamedTuple):
    """A record whose images are embedded.

    Attributes:
      headers: of the images.
      data: bytes of the record in an ArrayRecord.
    """

    record: Record | PreferencePair
    images: tuple[EmbeddedImage, ...]
    headers: tuple[ImageHeader, ...]
    data: bytes


@dataclasses.dataclass(frozen=True)
class Converter:
    """Converts records of any published form.

    Attributes:
      images: those that records name.
      leave_out: prefixes of image names, whose records are left out.
      columns: names of the columns of a table.
    """

    images: ImageStore
    leave_out: tuple[str, ...] = ()
    columns: ColumnsConfig = NO_COLUMNS

    def __call__(self, fields: Any, file: str, line: int) -> Converted | None:
        """Returns the converted record, or None for one that is left out.

        Raises:
          UserError: the record breaks its form, or an image cannot be read or has no known format.
        """
        record = parse_record(
            fields,
            kind=record_kind(fields),
            file=file,
            line=line,
            image_root="",
            columns=self.columns,
        )
        if any(is_below(image.name, self.leave_out) for image in record.images):
            return None
        images = tuple(
            image if isinstance(image, EmbeddedImage) else self.images.read(image.name)
            for image in record.images
        )
        headers = tuple(read_header(image.data, _RULES, str(image)) for image in images)
        return Converted(record, images, headers, pack_record(record_fields(record), images))


def record_kind(fields: Any) -> str:
    """Returns the kind of a published record: one with two answers is a preference pair."""
    answers = ("chosen", "rejected") if isinstance(fields, Mapping) else ()
    is_pair = any(fields.get(name) is not None for name in answers)
    return "preference" if is_pair else "conversation"


def record_fields(record: Record | PreferencePair) -> dict[str, Any]:
    """Returns the fields that `parse_record` reads as the same record, without its images."""
    turns = record.turns if isinstance(record, Record) else record.history
    messages = [("system", record.system)] if record.system is not None else []
    messages += [each for turn in turns for each in zip(("human", "gpt"), turn, strict=True)]
    answers = {}
    if isinstance(record, PreferencePair):
        messages.append(("human", record.question))
        answers = {"chosen": record.chosen, "rejected": record.rejected}
    conversations = [{"from": role, "value": text} for role, text in messages]
    return {"id": record.id, "conversations": conversations} | answers
