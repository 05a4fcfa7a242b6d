import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moddistill.prepare import run as run_module
from moddistill.prepare import shards
from moddistill.prepare.__main__ import main
from moddistill.storage.digests import read_digests, verify
from tests.prepare.conftest import image, read_rejected, read_shards, talk, write_json


@pytest.fixture
def shard_size():
    return 9


@pytest.fixture
def source(tmp_path, monkeypatch, shard_size):
    """Flags of an input of 12 shards: 100 records, of which every tenth is rejected."""
    monkeypatch.setattr(run_module, "records_per_shard", lambda pieces, converter: shard_size)
    (tmp_path / "1.png").write_bytes(image())
    names = ["missing.png" if i % 10 == 3 else "1.png" for i in range(100)]
    records = [talk(name, answer=f"Answer {i}.") for i, name in enumerate(names)]
    path = write_json(tmp_path / "a.json", records)
    return ("json", "--from", path, "--images", str(tmp_path))


def content(folder):
    """Returns the bytes of all files but those with times of the input."""
    ignored = ("prepare.json", "digests.json")
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name not in ignored}


def answers(folder):
    return [record["conversations"][1]["value"] for record in read_shards(folder)]


def refusal(*args):
    with pytest.raises(SystemExit) as error:
        main(list(map(str, args)))
    return str(error.value)


def test_shards_have_all_usable_records_in_order(source, prepare, capsys):
    folder = prepare(*source)
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{i:05d}-of-00012.array_record" for i in range(12)),
        "digests.json",
        "prepare.json",
        "rejected.jsonl",
    ]
    assert answers(folder) == [f"Answer {i}." for i in range(100) if i % 10 != 3]
    assert [line for line, _ in read_rejected(folder)] == list(range(4, 101, 10))
    assert verify(folder).written_by == "prepare"
    table = capsys.readouterr().out
    assert "| 100     |     90 |       10 |        0 |     90 |" in table
    assert "10  expected a file in" in table


def test_workers_write_the_same_bytes(source, prepare):
    expected = content(prepare(*source))
    assert content(prepare(*source, to="parallel", workers=2)) == expected


@pytest.fixture
def interrupted(source, tmp_path, monkeypatch):
    """A folder whose conversion was interrupted after three shards."""
    write, written = shards.ShardWriter.__call__, []

    def write_three(self, shard):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(shard.name)
        return write(self, shard)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shards.ShardWriter, "__call__", write_three)
        main([*source, "--to", str(tmp_path / "part"), "--workers", "0"])
    assert len(list((tmp_path / "part").glob("*.array_record"))) == 3
    return tmp_path / "part"


def test_an_interrupted_conversion_writes_only_the_missing_shards(
    source, prepare, interrupted, monkeypatch
):
    written = []
    write = shards.ShardWriter.__call__
    monkeypatch.setattr(
        shards.ShardWriter,
        "__call__",
        lambda self, shard: written.append(shard.name) or write(self, shard),
    )
    prepare(*source, to="part")
    assert written == [f"{i:05d}-of-00012.array_record" for i in range(3, 12)]
    assert content(interrupted) == content(prepare(*source, to="entire"))


def test_a_shard_without_its_counts_is_written_again(source, prepare, interrupted):
    (interrupted / ".work/00001-of-00012.array_record.json").unlink()
    prepare(*source, to="part")
    assert content(interrupted) == content(prepare(*source, to="entire"))


def test_a_shard_is_on_the_disk_before_it_has_its_name(source, prepare, tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def note(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.parent.name == ".work" and path.suffix == ".array_record":
            synced.append(path.name)
            assert not (tmp_path / "out" / path.name).exists()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    prepare(*source)
    assert synced == [f"{i:05d}-of-00012.array_record" for i in range(12)]


@pytest.mark.parametrize("shard_size", [1])
def test_a_killed_conversion_continues_to_the_same_bytes(source, prepare, interrupted):
    command = [sys.executable, "-m", "moddistill.prepare", *source, "--to", str(interrupted)]
    process = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL)
    while len(list(interrupted.glob("*.array_record"))) == 3 and process.poll() is None:
        time.sleep(0.001)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers
    assert 3 < len(list(interrupted.glob("*.array_record"))) < 100
    prepare(*source, to="part")
    assert content(interrupted) == content(prepare(*source, to="entire"))
    assert not [pid for pid in workers if is_running(pid)]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_conversion_interrupted_at_its_end_lists_each_record_once(
    source, prepare, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(
            run_module.Reasons, "commonest", lambda self, most: exec("raise KeyboardInterrupt")
        )
        prepare(*source, to="part")
    assert len(read_rejected(tmp_path / "part")) == 10
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run_module, "write_digests", lambda *args: exec("raise KeyboardInterrupt"))
        prepare(*source, to="part")
    assert content(prepare(*source, to="part")) == content(prepare(*source, to="entire"))
    verify(tmp_path / "part")


def test_a_finished_conversion_is_checked_and_not_repeated(source, prepare, capsys, monkeypatch):
    folder = prepare(*source)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    first = capsys.readouterr().out
    monkeypatch.setattr(shards.ShardWriter, "__call__", None)
    prepare(*source)
    assert capsys.readouterr().out == first
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    shard = folder / "00003-of-00012.array_record"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert "00003-of-00012.array_record does not match" in refusal(*source, "--to", folder)


def test_other_flags_are_refused(source, interrupted):
    message = refusal(*source, "--to", interrupted, "--leave-out", "x")
    assert message.startswith("error: --to: expected a folder begun with the same leave_out, got")
    (interrupted.parent / "other").mkdir()
    message = refusal(*source, "--to", interrupted, "--images", interrupted.parent / "other")
    assert "the same images, got" in message


def test_a_changed_input_is_refused(source, interrupted):
    path = Path(source[2])
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert "the same inputs, got" in refusal(*source, "--to", interrupted)
    path.write_text(path.read_text() + " ")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "the same inputs, got" in refusal(*source, "--to", interrupted)


def test_an_input_that_cannot_be_opened_leaves_no_folder(tmp_path):
    assert "matches none" in refusal("json", "--from", "none", "--to", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_files_is_refused(source, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    assert "an empty folder or one that prepare made" in refusal(
        *source, "--to", tmp_path / "other"
    )
    assert "expected a folder, got the file" in refusal(*source, "--to", source[2])


def test_two_runs_at_one_time_are_refused(source, tmp_path):
    with run_module._locked(tmp_path / "out/.work"):
        assert "a folder that no other run writes to" in refusal(*source, "--to", tmp_path / "out")


def test_no_usable_record_is_an_error_with_a_list(tmp_path, capsys):
    path = write_json(tmp_path / "a.json", [talk("1.png"), {}])
    message = refusal("json", "--from", path, "--to", tmp_path / "out", "--workers", "0")
    assert message == "error: --from: expected a usable record, got 2 that are not"
    assert [line for line, _ in read_rejected(tmp_path / "out")] == [1, 2]
    assert "rejected.jsonl lists the rejected records" in capsys.readouterr().out
    assert read_shards(tmp_path / "out") == []


def test_an_input_without_records_is_an_error(tmp_path):
    path = write_json(tmp_path / "a.json", [])
    message = refusal("json", "--from", path, "--to", tmp_path / "out", "--workers", "0")
    assert "expected a usable record, got 0" in message


def test_a_shard_has_about_256_mebibytes(tmp_path, monkeypatch, prepare):
    (tmp_path / "1.png").write_bytes(image() + bytes(10_000))
    path = write_json(tmp_path / "a.json", [talk("1.png")] * 100)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 100_000)
    folder = prepare("json", "--from", path, "--images", tmp_path)
    assert json.loads((folder / "prepare.json").read_text())["records_per_shard"] == 9
    assert len(read_digests(folder).files) == 12 + 1
    assert len(read_shards(folder)) == 100


def test_deeply_nested_values_are_rejected(tmp_path, prepare):
    (tmp_path / "a.jsonl").write_text(json.dumps(talk()) + "\n" + "[" * 900 + "]" * 900)
    folder = prepare("json", "--from", tmp_path / "a.jsonl")
    assert [line for line, _ in read_rejected(folder)] == [2]
