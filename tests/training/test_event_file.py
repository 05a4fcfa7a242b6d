import errno
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moddistill.errors import UserError
from moddistill.storage import text_file
from moddistill.training.event_file import EventFile


def crc32c(content):
    """Bit by bit, from the polynomial of Castagnoli."""
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def masked(content):
    value = crc32c(content)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(file):
    """Reads a file as TensorBoard does, with its checksums."""
    content, found = file.read_bytes(), []
    while content:
        length, check = struct.unpack("<QI", content[:12])
        assert check == masked(content[:8])
        body, check = content[12 : 12 + length], content[12 + length : 16 + length]
        assert struct.unpack("<I", check) == (masked(body),)
        found.append(Event.FromString(body))
        content = content[16 + length :]
    return found


def test_the_checksum_is_crc32c():
    assert crc32c(b"123456789") == 0xE3069283


def test_a_file_has_its_start_and_the_numbers_of_each_step(tmp_path):
    file = EventFile(tmp_path / "tensorboard", first_step=3)
    file.add(3, {"loss": 0.5, "lr": 1e-3})
    file.add(4, {"loss": float("nan")})
    version, start, *rows = events(file.path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (3, SessionLog.START)
    numbers = [{x.tag: x.simple_value for x in row.summary.value} for row in rows]
    assert [row.step for row in rows] == [3, 4]
    assert numbers[0] == {"loss": 0.5, "lr": pytest.approx(1e-3)}
    assert numbers[1]["loss"] != numbers[1]["loss"]
    assert "tfevents" in file.path.name


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    file = EventFile(tmp_path, first_step=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(text_file, "write_all", full)
    with pytest.raises(UserError, match=r"tfevents.*enough space, got 'No space left on device'"):
        file.add(1, {"loss": 1.0})
