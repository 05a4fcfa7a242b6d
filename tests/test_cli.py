import json
import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from moddistill.cli import parse_flags, plain_errors
from moddistill.config import TrainConfig
from moddistill.configdict import from_config_dict

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
    ("module", "experiment", "setting", "nearest"),
    [
        ("train", "d2s.py:tiny", "learning_rate", "optim.lr"),
        ("recipe", "llava_mod.py", "stages.d2s.optim.lrr", "stages.d2s.optim.lr"),
    ],
)
def test_unknown_override_ends_with_one_line(module, experiment, setting, nearest, tmp_path):
    where = ("--workdir", str(tmp_path / "run"), "--config", f"experiments/{experiment}")
    done = run(module, *where, f"--config.{setting}=3")
    assert done.returncode == 1
    said = f"error: config.{setting} is not a setting; did you mean {nearest!r}?\n"
    assert done.stderr == said
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
        ("experiments/d2s.py", ["--config.steps.x=1"], "config.steps.x is not a .*'steps'"),
        ("experiments/d2s.py", ["--noconfig.scna"], "config.scna is not a .*'scan'"),
        ("experiments/d2s.py", ["--config.xyz", "1"], "config.xyz is not a .*; accepted: accumu"),
        (
            "experiments/d2s.py",
            ["--config.data.sources.mine.images=x"],
            r"config.data.sources.mine is not a source; accepted: d2s, or a new one with "
            r"--config.data.sources.mine.path=FILE",
        ),
        (
            "experiments/d2s.py",
            ["--config.data.sources.my-data.path=x"],
            r"config.data.sources.my-data: 'my-data' cannot name a source here; accepted: letters",
        ),
    ],
)
def test_mistake_in_the_experiment_ends_with_one_line(parse, experiment, overrides, message):
    with pytest.raises(SystemExit, match=f"^error: {message}") as error:
        parse(experiment, *overrides)
    assert "\n" not in str(error.value)


SOURCES = (
    "accepted: --config.data.sources.NAME.path=FILE, which adds a source, or "
    "--config.data.sources=\"{'NAME': {'path': 'FILE'}}\", which replaces all"
)


@load_module
@pytest.mark.parametrize(
    ("setting", "value", "accepted"),
    [
        *(("data.sources", value, SOURCES) for value in ("x", "3", "")),
        *(
            (part, "a.json", f"accepted: --config.{part}.path=FILE")
            for part in ("data.sources.mine", "data.sources.d2s", "data.heldout")
        ),
        ("optim", "x", "accepted: its settings one by one, such as --config.optim.b1=VALUE"),
    ],
)
def test_one_value_for_several_settings_ends_with_what_to_set(parse, setting, value, accepted):
    for override in ([f"--config.{setting}={value}"], [f"--config.{setting}", value]):
        with pytest.raises(SystemExit) as error:
            parse("experiments/d2s.py", *override)
        assert str(error.value) == f"error: config.{setting} is {value!r}; {accepted}"


@load_module
def test_one_value_for_a_part_of_a_recipe_names_the_stage(parse):
    with pytest.raises(SystemExit, match=r"accepted: --config\.stages\.d2s\.data\.sources\.NAME"):
        parse("experiments/llava_mod.py", "--config.stages.d2s.data.sources=x")
    with pytest.raises(SystemExit, match=r"config\.stages is 'x'; .* --config\.stages\.d2d\.\w+="):
        parse("experiments/llava_mod.py", "--config.stages=x")


@pytest.fixture
def sources(parse):
    """`sources(experiment, *overrides)`: path, images and weight of each source of `d2d`."""

    def read(experiment, *overrides):
        parse(experiment, *overrides)
        config = flags.FLAGS.config
        config = config.stages.d2d if "stages" in config else config
        found = from_config_dict(TrainConfig, config.to_dict()).data.sources
        return {name: (x.path, x.images, x.weight) for name, x in found.items()}

    return read


@load_module
def test_an_override_of_its_path_adds_a_source(sources):
    mine = "--config.data.sources.mine"
    added = sources("experiments/d2d.py", f"{mine}.images=pics", f"{mine}.path=a.json")
    assert added == {"d2d": ("data/d2d.json", "data/images", 1), "mine": ("a.json", "pics", 1)}


def test_a_source_of_the_command_line_is_read_by_the_command(tmp_path):
    talk = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"conversations": talk}) + "\n")
    experiment = ("--config", "experiments/sft.py:tiny", "--config.steps=1")
    mine = f"--config.data.sources.mine.path={tmp_path}/mine.jsonl"
    done = run("train", *experiment, "--workdir", str(tmp_path / "run"), mine)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(written["data"]["sources"]) == {"conversations", "mine"}


@load_module
def test_an_override_adds_a_source_to_a_stage_of_a_recipe(sources):
    mine = "--config.stages.d2d.data.sources.mine"
    added = sources("experiments/llava_mod.py", f"{mine}.path=a.json", f"{mine}.weight=2.5")
    assert added["mine"] == ("a.json", "", 2.5)


@load_module
def test_an_override_replaces_all_sources(sources):
    mine = "{'mine': {'path': 'a.json', 'images': 'pics'}}"
    replaced = sources("experiments/d2d.py", f"--config.data.sources={mine}")
    assert replaced == {"mine": ("a.json", "pics", 1)}


@load_module
@pytest.mark.parametrize("overrides", [(), ("--config.seed=1",)])
def test_error_in_the_code_of_an_experiment_is_not_taken_for_an_override(
    parse, overrides, tmp_path
):
    file = tmp_path / "mine.py"
    file.write_text("import math\n\n\ndef get_config():\n    return math.foo\n")
    with pytest.raises(AttributeError, match="module 'math' has no attribute 'foo'"):
        parse(file, *overrides)


def test_error_of_an_experiment_is_one_line(tmp_path):
    """The path of the experiment is relative, as it is typed."""
    workdir = tmp_path / "run"
    experiment = "experiments/init.py:pair=interleave"
    done = run("train", "--config", experiment, "--workdir", str(workdir))
    assert done.returncode == 1
    assert re.fullmatch(r"error: the projector of 'llava-hf/.*; accepted: .*\n", done.stderr)
    assert not workdir.exists()


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
