"""Converted records as readable text."""

from collections.abc import Iterator
from pathlib import Path

from moddistill.data.records import PreferencePair
from moddistill.errors import UserError, one_line
from moddistill.prepare.convert import Converted, Converter
from moddistill.prepare.inputs import InputSpec
from moddistill.prepare.packagings import open_input
from moddistill.prepare.shards import Piece, converted


def show(spec: InputSpec, most: int, work: Path) -> Iterator[str]:
    """Yields the text of the first records of an input, and of the rejected ones between them.

    Args:
      most: number of usable records.
      work: folder of the indices of archives.

    Raises:
      UserError: the input cannot be read.
    """
    opened = open_input(spec, work)
    converter = Converter(opened.images, spec.leave_out, spec.columns)
    pieces = (Piece(each, places) for each in opened.records for places in each.places())
    left = most
    for file, line, result in converted(pieces, converter):
        if result is None:
            continue
        title = f"{one_line(file)}, record {line}"
        if isinstance(result, UserError):
            yield f"{title}\n  rejected: {escape(str(result))}\n"
            continue
        yield f"{title}\n{_text(result)}\n"
        left -= 1
        if not left:
            return


def _text(result: Converted) -> str:
    record, lines = result.record, []
    for image, header in zip(result.images, result.headers, strict=True):
        size = f"{header.width} x {header.height}, {len(image.data):,} bytes"
        lines.append(f"image: {one_line(image.name) or '(no name)'}, {header.format}, {size}")
    if record.system is not None:
        lines.append(f"system: {record.system}")
    is_pair = isinstance(record, PreferencePair)
    for question, answer in record.history if is_pair else record.turns:
        lines += [f"user: {question}", f"assistant: {answer}"]
    if is_pair:
        lines += [f"user: {record.question}", f"chosen: {record.chosen}"]
        lines.append(f"rejected: {record.rejected}")
    return "\n".join(f"  {escape(line)}" for line in lines)


def escape(text: str) -> str:
    """Returns a text whose control characters are visible, and whose lines are indented."""
    shown = "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text
    )
    return shown.replace("\n", "\n    ")
