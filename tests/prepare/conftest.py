"""Small published data sets, written into a temporary folder."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from array_record.python import array_record_module
from PIL import Image

from moddistill.data.array_records import unpack_record
from moddistill.prepare.__main__ import main


def image(color=(200, 30, 60), size=(8, 6), kind="PNG"):
    """Returns the bytes of an image of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, kind)
    return stream.getvalue()


def talk(name=None, question="What is this?", answer="A dog.", **fields):
    """Returns a LLaVA record, with an image if it has a name."""
    asked = f"<image>\n{question}" if name else question
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} | ({"image": name} if name else {}) | fields


def write_json(path, records):
    Path(path).write_text(json.dumps(records))
    return str(path)


def write_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return str(path)


def write_tar(path, files):
    """Writes (name or TarInfo, content) in order."""
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def read_shards(folder):
    """Returns the fields of all records in the shards of a folder, in order."""
    records = []
    for path in sorted(Path(folder).glob("*.array_record")):
        reader = array_record_module.ArrayRecordReader(str(path))
        records += (
            [unpack_record(data) for data in reader.read_all()] if reader.num_records() else []
        )
        reader.close()
    return records


def read_rejected(folder):
    """Returns (line, reason) of the rejected records."""
    path = Path(folder) / "rejected.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(item["line"], item["reason"]) for item in map(json.loads, lines)]


@pytest.fixture
def prepare(tmp_path):
    """Runs the command in this process; returns the folder of its shards."""

    def run(form, *flags, to="out", workers=0):
        output = ["--to", str(tmp_path / to), "--workers", str(workers)]
        main([form, *map(str, flags), *output])
        return tmp_path / to

    return run
