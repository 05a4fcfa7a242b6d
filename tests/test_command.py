import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from moddistill.command import parse_flags, plain_errors
from moddistill.config import TrainConfig, from_config_dict

# ml_collections loads config files in a way that Python 3.12 removes, and has another for 3.12.
load_module = pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning", "ignore:.*_load_module_shim:ImportWarning"
)


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


@pytest.fixture
def parse(monkeypatch):
    """`parse(experiment, *overrides)`: those flags through the parser of the entry points."""

    def parsed(experiment, *overrides):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        monkeypatch.setattr(flags, "FLAGS", values)
        # ml_collections looks for overrides there.
        monkeypatch.setattr(sys, "argv", ["train", f"--config={experiment}", *overrides])
        return parse_flags(sys.argv)

    return parsed


@load_module
@pytest.mark.parametrize(
    ("experiment", "overrides", "message"),
    [
        ("experiments/gone.py", ["--config.seed=1"], "--config cannot be read: .*ts/gone.py'"),
        ("experiments/gone.py:tiny", [], "--config cannot be read: .*'experiments/gone.py'"),
        ("experiments/d2s.py:demmo", [], "experiment argument 'demmo' is unknown; .*'demo'"),
        ("experiments/d2s.py", ["--config.steps=many"], "flag --config.steps=many: invalid liter"),
    ],
)
def test_mistake_in_the_experiment_ends_with_one_line(parse, experiment, overrides, message):
    with pytest.raises(SystemExit, match=f"^error: {message}") as error:
        parse(experiment, *overrides)
    assert "\n" not in str(error.value)


@load_module
@pytest.mark.parametrize("overrides", [(), ("--config.seed=1",)])
def test_error_in_the_code_of_an_experiment_is_not_taken_for_an_override(
    parse, overrides, tmp_path
):
    file = tmp_path / "mine.py"
    file.write_text("import math\n\n\ndef get_config():\n    return math.foo\n")
    with pytest.raises(AttributeError, match="module 'math' has no attribute 'foo'"):
        parse(file, *overrides)


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
