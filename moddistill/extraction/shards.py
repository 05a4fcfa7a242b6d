"""The files of a cache, each written when it is complete."""

from collections.abc import Mapping
from pathlib import Path

from moddistill.data.array_records import writing_records
from moddistill.extraction.plan import Shard
from moddistill.teachers.entries import Entry, EntryFormat

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
    with writing_records(partial) as write:
        for position in range(shard.size):
            write(format.pack(entries.get(position, absent)))
    partial.rename(folder / shard.name)
