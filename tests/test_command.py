import subprocess
import sys

import numpy as np
import pytest

from moddistill.command import plain_errors
from moddistill.config import TrainConfig, from_config_dict


def run(module, *args):
    return subprocess.run(
        [sys.executable, "-m", f"moddistill.{module}", *args],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("module", "experiment", "override", "name"),
    [
        ("train", "d2s.py:tiny", "stepz=3", "stepz"),
        ("train", "d2s.py:tiny", "optm.lr=3", "optm"),
        ("recipe", "llava_mod.py", "stages.d2s.optim.lrr=3", "lrr"),
    ],
)
def test_misspelt_override_ends_with_one_line(module, experiment, override, name, tmp_path):
    where = ("--workdir", str(tmp_path / "run"), "--config", f"experiments/{experiment}")
    done = run(module, *where, f"--config.{override}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"--config has no such setting: '{name}' Did you mean")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_error_of_a_command_is_one_line():
    done = run("generate", "--model", "runs/none/model", "--prompt", "hello")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'runs/none/model' is not a model folder")
    assert len(done.stderr.splitlines()) == 1


def test_only_errors_raised_here_lose_their_traceback():
    with pytest.raises(SystemExit, match=r"error: config\.stepz is not a setting"), plain_errors():
        from_config_dict(TrainConfig, {"stepz": 3})
    with pytest.raises(ValueError, match="broadcast"), plain_errors():
        np.zeros(2) + np.zeros(3)
