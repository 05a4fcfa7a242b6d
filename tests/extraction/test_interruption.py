"""Extractions that are interrupted or killed continue with the shards that are missing."""

import os
import signal
import subprocess
import sys

import chex
import numpy as np
import pytest

from moddistill.config import CacheConfig
from moddistill.errors import UserError
from moddistill.extraction import batches
from moddistill.extraction.run import extract
from moddistill.teachers.cache import TeacherCache


def assert_equal(folder, other):
    a, b = TeacherCache(folder), TeacherCache(other)
    for number in range(8):
        first, second = (each.entry("conversations", number) for each in (a, b))
        np.testing.assert_array_equal(first.targets.labels, second.targets.labels)
        chex.assert_trees_all_close(first.targets, second.targets, atol=2e-3)


@pytest.mark.slow
def test_an_interrupted_extraction_makes_the_missing_shards(
    tiny_config, cached, tmp_path, monkeypatch
):
    whole, folder = cached("d2s", CacheConfig("top_k", 8)), tmp_path / "cache"
    written = []

    def write_two(folder, shard, *args, write=batches.write_shard):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(folder, shard, *args)
        written.append(shard.name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batches, "write_shard", write_two)
        extract(tiny_config("d2s"), CacheConfig("top_k", 8), folder)
    with pytest.raises(UserError, match=r"without records 6 to 7 of conversations; the same"):
        TeacherCache(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    assert len(before) == len(written) == 2
    assert_refused_if_damaged(tiny_config("d2s"), folder, folder / written[0])
    extract(tiny_config("d2s"), CacheConfig("top_k", 8), folder)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    ours = {path.name for path in folder.rglob("*") if path.is_file()}
    assert ours == {path.name for path in whole.rglob("*") if path.is_file()}
    assert_equal(folder, whole)


def assert_refused_if_damaged(config, folder, shard):
    """A finished cache would have digests of the damaged file."""
    whole, state = shard.read_bytes(), shard.stat()
    flipped = bytearray(whole)
    flipped[200] ^= 4  # which opening does not notice
    for damaged in (whole[: len(whole) // 2], bytes(flipped)):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{shard.name}: expected \d+ undamaged entries, got"):
            extract(config, CacheConfig("top_k", 8), folder)
    shard.write_bytes(whole)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns))


KILLED = """
import os, signal, sys
from moddistill.extraction import plan, shards
from moddistill.teachers import cache

plan.SHARD_RECORDS = cache.SHARD_RECORDS = 3
opened = []

def writing(path, together, begin=shards.writing_records):
    opened.append(path)
    files = begin(path, together)
    write = files.__enter__()
    def append(data):
        write(data)
        if len(opened) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
    class Files:
        def __enter__(self): return append
        def __exit__(self, *error): return files.__exit__(*error)
    return Files()

shards.writing_records = writing
from moddistill import extract
extract.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_a_killed_extraction_continues_with_the_shard_that_was_half_written(
    tiny_config, cached, tmp_path
):
    def run(dies_in_shard):
        flags = ["--config", "experiments/d2s.py:tiny", "--top_k", "8", "--out", str(folder)]
        command = [sys.executable, "-c", KILLED, str(dies_in_shard), *flags]
        return subprocess.run(command, capture_output=True, text=True)

    folder = tmp_path / "cache"
    assert run(2).returncode == -signal.SIGKILL
    names = {path.name for path in folder.glob("*.array_record")}
    assert len(names) == 1 and len([*folder.rglob("*.array_record")]) == 2  # one of them in parts
    with pytest.raises(UserError, match=r"without records 3 to 7 of conversations; the same"):
        TeacherCache(folder)
    made = run(0)
    assert made.returncode == 0, made.stderr
    assert {path.name for path in folder.glob("*.array_record")} > names
    assert_equal(folder, cached("d2s", CacheConfig("top_k", 8)))
