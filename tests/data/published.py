"""Records in published forms, for the tests of their readers."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from moddistill.data.forms import parse_record
from moddistill.data.image_files import ImageFile
from moddistill.data.record_files import open_file
from moddistill.data.records import PreferencePair, Record
from moddistill.errors import UserError

PNG = b"\x89PNG of a dog"
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as `datasets` writes them
FILE = ImageFile("root", "a.png")
UNUSED = "expected none, since training would not use it, got "


def llava(*values, roles=("human", "gpt"), **fields):
    messages = [{"from": roles[n % 2], "value": value} for n, value in enumerate(values)]
    return {"conversations": messages, **fields}


def chat(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def parse(fields, kind="conversation", file="f.json", line=1, **options):
    """Returns the record in the fields, or the reason for which it is rejected."""
    try:
        return parse_record(fields, kind=kind, file=file, line=line, image_root="root", **options)
    except UserError as error:
        return str(error)


def content(record):
    """Returns what a conversation or a pair has, besides its place."""
    assert isinstance(record, Record | PreferencePair), record
    if isinstance(record, Record):
        return record.turns, record.images, record.system
    answers = (record.question, record.chosen, record.rejected)
    return record.history, answers, record.images, record.system


def write_file(path, records, schema=None):
    """Writes records as JSON, JSONL or parquet, by the suffix of the path."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records, schema), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_file(path, **options):
    """Returns the records of a file, each read by itself, or the reasons."""
    file, found = open_file(str(path)), []
    for block in file.blocks():
        for offset, size, line in zip(*(each.tolist() for each in block.places), strict=True):
            try:
                fields = file.read(offset, size)
            except UserError as error:
                found.append(str(error))
                continue
            found.append(parse(fields, file=str(path), line=line, **options))
    return found
