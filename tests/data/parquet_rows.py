"""Rows of a parquet file, as an index and as a stream read them."""

import random

from moddistill.errors import UserError


def content(file):
    """Returns the bytes of a file."""
    with open(file.path, "rb") as opened:
        return opened.read()


def read_places(file):
    """Returns (line, fields or reason) of all rows, each read by itself."""
    rows = []
    for block in file.blocks():
        for offset, size, line in zip(*(column.tolist() for column in block.places), strict=True):
            try:
                rows.append((line, file.read(offset, size)))
            except UserError as error:
                rows.append((line, str(error)))
    return rows


def read_blocks(file):
    """Returns (line, fields or reason) of all rows, as an index sees them."""
    rows = []
    for block in file.blocks():
        for line, fields in zip(block.places.line.tolist(), block.read(), strict=True):
            rows.append((line, str(fields) if isinstance(fields, UserError) else fields))
        assert block.end == rows[-1][0]
    assert len(rows) == file.extent()
    return rows


def images(count, size=1000):
    return [{"bytes": random.Random(n).randbytes(size), "path": f"{n}.png"} for n in range(count)]
