"""TensorBoard's event files, written record by record and without a thread of their own.

A file is a sequence of TFRecords, each an `Event` message:
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details.
"""

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from moddistill.storage.text_file import append

_VERSION = "brain.Event:2"


class EventFile:
    """An event file of a run that starts, or resumes, with a step.

    TensorBoard drops what earlier files of the folder have from that step on.

    Raises:
      UserError: the disk is full, here and in `add`.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # Names sort by the time of their start; "tfevents" marks the kind of file.
        self.path = folder / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
        start = SessionLog(status=SessionLog.START)
        self._append(Event(wall_time=time.time(), file_version=_VERSION))
        self._append(Event(wall_time=time.time(), step=first_step, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Appends numbers by their names."""
        points = [Summary.Value(tag=name, simple_value=x) for name, x in values.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))

    def _append(self, event: Event) -> None:
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        parts = (length, _checksum(length), content, _checksum(content))
        append(self.path, b"".join(parts))


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(content))
