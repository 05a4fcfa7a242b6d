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
    named, errors = set(), {"errors": tmp_path / "stderr"}
    for size in SIZES:
        workdir = disk(f"{size}k") / "run"
        code = runs.start(workdir, *FLAGS, **errors).wait(300)
        printed = errors["errors"].read_text()
        assert code == 1 and "Traceback" not in printed, printed
        [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert "expected a disk with enough space, got 'No space left on device'" in line
        named.add(line.removeprefix(f"error: {workdir}/").split(":")[0].split("/")[0])
        disk(LARGE)
        runs.finish(workdir, *FLAGS, **errors)
        assert runs.same(workdir, whole), size
        shutil.rmtree(workdir)
    print(f"{len(SIZES)} sizes; what could not be written: {sorted(named)}")
    small = {"config.json", "models.json", "sources.json", "tensorboard"}
    assert named >= small | {"checkpoints", "model"}
