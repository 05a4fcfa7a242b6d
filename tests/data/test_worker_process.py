"""Worker processes end with their parent, whatever they do, and take nothing from its main."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moddistill.data.worker_process import WorkerContext

PARENT = """
import time
from moddistill.data.worker_process import WorkerContext

class SlowImport:
    def __reduce__(self):
        return time.sleep, (60,)

arguments = {arguments}
process = WorkerContext().Process(target=time.sleep, args=arguments)
process.start()
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("arguments", ["(60,)", "(SlowImport(),)"], ids=["working", "importing"])
def test_killed_parent_takes_its_process_along(arguments, stopped):
    """At each moment of its life, and also while it is stopped."""
    script = PARENT.format(arguments=arguments)
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    stat = Path(f"/proc/{worker}/stat")
    time.sleep(1)
    assert stat.exists()
    if stopped:
        os.kill(worker, signal.SIGSTOP)
    with parent:
        parent.kill()
    deadline = time.monotonic() + 5
    while stat.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
        pytest.fail("it lives on")


def test_signals_for_the_parent_do_not_end_a_process_that_starts():
    """A scheduler sends them to all processes of a job."""
    process = WorkerContext().Process(target=time.sleep, args=(1,))
    process.start()
    for _ in range(5):
        for sent in (signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid, sent)
        time.sleep(0.02)
    process.join(30)
    assert process.exitcode == 0
