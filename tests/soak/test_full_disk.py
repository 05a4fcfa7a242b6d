"""A real file system that is full, at each of a run's writes in turn."""

import shutil
import subprocess

import pytest

from tests.soak import runs

pytestmark = pytest.mark.soak
FLAGS = ["--config.steps=4", "--config.save_every=1", "--config.log_every=1"]
LARGE = "32m"
# KiB: small files need a page each, then the event file, checkpoints, and at last the model.
SIZES = [4, 8, 12, 16, 20, 24, 28, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 576, 640]
SIZES += [672, 680, 688, 692, 696, 700, 704, 708, 712]
INDEX_SIZES = [4, 8, 12]


def mount(*arguments):
    return subprocess.run(["mount", *arguments], capture_output=True, text=True)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own; `resize(size)` changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = mount("-t", "tmpfs", "-o", f"size={LARGE}", "tmpfs", str(folder))
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")

    def resize(size):
        assert mount("-o", f"remount,size={size}", str(folder)).returncode == 0
        return folder

    yield resize
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_the_same_command_finishes_once_there_is_room(disk, tmp_path):
    whole = tmp_path / "whole" / "run"
    runs.finish(whole, *FLAGS)
    named, errors = set(), tmp_path / "stderr"
    for size in SIZES:
        workdir = disk(f"{size}k") / "run"
        line = error_of(workdir, *FLAGS, errors=errors)
        assert "expected a disk with enough space, got 'No space left on device'" in line
        named.add(line.removeprefix(f"error: {workdir}/").split(":")[0].split("/")[0])
        disk(LARGE)
        runs.finish(workdir, *FLAGS, errors=errors)
        assert runs.same(workdir, whole), size
        shutil.rmtree(workdir)
    print(f"{len(SIZES)} sizes; what could not be written: {sorted(named)}")
    small = {"config.json", "models.json", "sources.json", "tensorboard"}
    assert named >= small | {"checkpoints", "model"}


def test_the_index_of_records_too(disk, tmp_path):
    whole = tmp_path / "whole" / "run"
    runs.finish(whole, *FLAGS)
    for size in INDEX_SIZES:
        index, workdir = disk(f"{size}k") / "index", tmp_path / str(size) / "run"
        flags = [*FLAGS, f"--config.data.index={index}"]
        assert "No space left on device" in error_of(workdir, *flags)
        disk(LARGE)
        runs.finish(workdir, *flags)
        assert runs.same(workdir, whole), size
        shutil.rmtree(index)


def error_of(workdir, *flags, **options):
    """Runs until an error, and returns the line that says it."""
    code = runs.start(workdir, *flags, **options).wait(300)
    printed = options.get("errors", runs.printed_by(workdir)).read_text()
    assert code == 1 and "Traceback" not in printed, printed
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line
