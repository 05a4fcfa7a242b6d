"""The files of a cache, each written when it is complete."""

from collections.abc import Mapping
from pathlib import Path

from moddistill.data.array_records import writing_records
from moddistill.extraction.plan import Shard
from moddistill.teachers.cache import SHARD_RECORDS
from moddistill.teachers.entries import Entry, EntryFormat

_READ = 2**14  # bytes that are read for one entry at most, of small entries
_MOST_TOGETHER = 64
# Bytes of a group of entries in a file, and of a file, beyond those of the entries themselves.
_OF_GROUP, _OF_FILE = 160, 2**16
WORK = ".work"  # folder of the lock and of the shard that is being written


def write_shard(
    folder: Path, shard: Shard, entries: Mapping[int, Entry], format: EntryFormat
) -> None:
    """Writes a shard.

    Args:
      entries: by their positions in it; other records are left out of those that a teacher reads.
    """
    partial = folder / WORK / shard.name
    absent = Entry(None, "left out of the teacher's records")
    packed = [format.pack(entries.get(position, absent)) for position in range(shard.size)]
    with writing_records(partial, entries_together(sum(map(len, packed)) / len(packed))) as write:
        for data in packed:
            write(data)
    partial.rename(folder / shard.name)


def entries_together(size: int | float) -> int:
    """Returns how many entries of a mean size in bytes are read at one time."""
    return max(1, min(_MOST_TOGETHER, int(_READ / size)))


def stored_size(size: int | float) -> float:
    """Returns the bytes in a file of an entry that has `size` bytes."""
    return size + _OF_GROUP / entries_together(size) + _OF_FILE / SHARD_RECORDS
