"""`kill -9` before each change that a run makes to its files, and to the index of its records."""

import re
import shutil
import signal

import pytest

from tests.soak import runs

pytestmark = pytest.mark.soak
FLAGS = ["--config.steps=2", "--config.save_every=1", "--config.log_every=1"]


def test_the_same_command_finishes_after_every_interruption(tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    workdir, whole = tmp_path / "broken" / "run", tmp_path / "whole"
    options = {"variables": {"TMPDIR": str(records)}}
    runs.finish(whole, *FLAGS, **options)  # makes the records, which are not the run's

    def begin(last):
        """A run whose `last` change does not come."""
        for made in (*records.glob("*/.index"), workdir.parent):
            shutil.rmtree(made)
        module = ("tests.soak.interrupted", f"{tmp_path}/", str(last))
        return runs.start(workdir, *FLAGS, module=module, **options).wait(300)

    workdir.parent.mkdir()
    assert begin(0) == 0
    count = int(re.search(r"changes: (\d+)", runs.printed_by(workdir).read_text())[1])
    assert runs.same(workdir, whole)
    for number in range(1, count + 1):
        assert begin(number) == -signal.SIGKILL, number
        printed = runs.finish(workdir, *FLAGS, **options)
        assert "Traceback" not in printed, printed
        assert runs.same(workdir, whole), number
    print(f"{count} interruptions, {count} runs with the results of the undisturbed one")
