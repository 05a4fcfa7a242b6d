"""Pools of processes: results, and processes that are killed or cannot start."""

import os
import signal
import subprocess
import sys

import pytest

from moddistill.data.worker_pool import worker_pool

NO_GUARD = """
from moddistill.data.worker_pool import worker_pool
with worker_pool(1) as pool:
    print(pool.submit(abs, -1).result())
"""


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_process_is_started_once_and_its_errors_are_raised():
    with worker_pool(1, os.putenv, "MODDISTILL_TEST", "3") as pool:
        assert pool.submit(int, "12").result() == 12
        printed = pool.submit(subprocess.check_output, ["printenv", "MODDISTILL_TEST"], text=True)
        assert printed.result() == "3\n"
        with pytest.raises(ValueError, match="invalid literal"):
            pool.submit(int, "x").result()


def test_killed_process_is_an_error():
    error = pytest.raises(ValueError, match=r"got one that was killed \(out of memory\?\)")
    with error, worker_pool(2) as pool:
        pool.submit(kill_self).result()


def test_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(NO_GUARD)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1\n", "")
