import subprocess
import sys

import pytest

from moddistill.training.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from moddistill.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_workdir_has_one_run_at_a_time(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        message = rf"^--workdir: expected a folder without a run in progress, .* {other.pid} runs"
        with pytest.raises(ValueError, match=message), locked(tmp_path / "run"):
            pass
        other.kill()
        other.wait()
        with locked(tmp_path / "run"):  # a killed process holds no lock
            pass
    with locked(tmp_path / "run"):
        pass
