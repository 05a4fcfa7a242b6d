import json
import re
import subprocess
import sys

import pytest

from moddistill.cli.experiment import read_experiment
from moddistill.config import TaskConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.errors import UserError


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
    said = f"error: config.{setting} is not a setting (did you mean {nearest!r}?)\n"
    assert done.stderr == said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("experiment", "overrides", "message"),
    [
        (
            "experiments/gone.py",
            ["--config.seed=1"],
            "--config: expected an experiment file, got 'experiments/gone.py'",
        ),
        ("experiments/gone.py:tiny", [], "--config: expected an .*, got 'experiments/gone.py'"),
        ("experiments/d2s.py:demmo", [], "experiment argument: .*'demmo' .*mean 'demo'"),
        (
            "experiments/d2s.py",
            ["--config.steps=many"],
            "config.steps: expected a value of type int, got 'many'",
        ),
        (
            "experiments/d2s.py",
            ["--config.optim.lr", "1e-5x"],
            "config.optim.lr: expected a value of type float, got '1e-5x'",
        ),
        (
            "experiments/d2s.py",
            ["--config.moe.norm_topk_prob=perhaps"],
            "config.moe.norm_topk_prob: expected a value of type bool, got 'perhaps'",
        ),
        ("experiments/d2s.py", ["--config.steps"], "Missing value for flag --config.steps"),
        ("experiments/d2s.py", ["--config.steps.x=1"], "config.steps.x is not a .*'steps'"),
        ("experiments/d2s.py", ["--noconfig.scna"], "config.scna is not a .*'scan'"),
        (
            "experiments/d2s.py",
            ["--config.xyz", "1"],
            "config.xyz is not a .*; expected .* donate",
        ),
        (
            "experiments/d2s.py",
            ["--config.data.sources.mine.images=x"],
            r"config.data.sources.mine is not a source: expected one of ai2d, .*, or a new one "
            r"with --config.data.sources.mine.path=FILE",
        ),
        (
            "experiments/d2s.py",
            ["--config.data.sources.my-data.path=x"],
            r"config.data.sources.my-data: expected a name of letters, digits and _, got 'my-data'",
        ),
        (
            "experiments/d2s.py",
            ["--config.tasks.vqa.limit=5"],
            r"config.tasks.vqa is not a task: expected one of none yet, or a new one with "
            r"--config.tasks.vqa.task=NAME",
        ),
    ],
)
def test_mistake_in_the_experiment_is_one_line(experiment, overrides, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        read_experiment(experiment, overrides)
    assert "\n" not in str(error.value)


SOURCES = (
    "--config.data.sources.NAME.path=FILE, which adds a source, or "
    "--config.data.sources=\"{'NAME': {'path': 'FILE'}}\", which replaces all"
)


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        *(("data.sources", value, SOURCES) for value in ("x", "3", "")),
        *(
            (part, "a.json", f"--config.{part}.path=FILE")
            for part in ("data.sources.mine", "data.sources.d2s", "data.heldout")
        ),
        ("optim", "x", "its settings one by one, such as --config.optim.b1=VALUE"),
    ],
)
def test_one_value_for_several_settings_ends_with_what_to_set(setting, value, expected):
    for override in ([f"--config.{setting}={value}"], [f"--config.{setting}", value]):
        with pytest.raises(UserError) as error:
            read_experiment("experiments/d2s.py", override)
        assert str(error.value) == f"config.{setting}: expected {expected}, got {value!r}"


def test_one_value_for_a_part_of_a_recipe_names_the_stage():
    recipe = "experiments/llava_mod.py"
    with pytest.raises(UserError, match=r"expected --config\.stages\.d2s\.data\.sources\.NAME"):
        read_experiment(recipe, ["--config.stages.d2s.data.sources=x"])
    with pytest.raises(UserError, match=r"^config\.stages: .* --config\.stages\.d2d\.\w+=.*'x'$"):
        read_experiment(recipe, ["--config.stages=x"])


def sources(experiment, *overrides):
    """Path, images and weight of each source; those of `d2d` for a recipe."""
    config, _ = read_experiment(experiment, overrides)
    config = config.stages.d2d if "stages" in config else config
    found = from_config_dict(TrainConfig, config.to_dict()).data.sources
    return {name: (x.path, x.images, x.weight) for name, x in found.items()}


def test_an_override_of_its_path_adds_a_source():
    mine = "--config.data.sources.mine"
    added = sources("experiments/d2d.py", f"{mine}.images=pics", f"{mine}.path=a.json")
    assert added == sources("experiments/d2d.py") | {"mine": ("a.json", "pics", 1)}


def test_a_source_of_the_command_line_is_read_by_the_command(tmp_path):
    talk = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"conversations": talk}) + "\n")
    experiment = ("--config", "experiments/sft.py:tiny", "--config.steps=1")
    mine = f"--config.data.sources.mine.path={tmp_path}/mine.jsonl"
    done = run("train", *experiment, "--workdir", str(tmp_path / "run"), mine)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(written["data"]["sources"]) == {"conversations", "mine"}


def test_an_override_adds_a_source_to_a_stage_of_a_recipe():
    mine = "--config.stages.d2d.data.sources.mine"
    added = sources("experiments/llava_mod.py", f"{mine}.path=a.json", f"{mine}.weight=2.5")
    assert added["mine"] == ("a.json", "", 2.5)


@pytest.mark.parametrize("experiment", ["experiments/d2s.py", "experiments/llava_mod.py"])
def test_an_override_adds_a_task(experiment):
    stage = "stages.d2s." if "llava_mod" in experiment else ""
    task = f"--config.{stage}tasks.some"
    config, _ = read_experiment(experiment, [f"{task}.task=pope", f"{task}.limit=5"])
    config = config.stages.d2s if stage else config
    tasks = from_config_dict(TrainConfig, config.to_dict()).tasks
    assert tasks == {"some": TaskConfig("pope", limit=5)}


def test_an_override_replaces_all_sources():
    mine = "{'mine': {'path': 'a.json', 'images': 'pics'}}"
    replaced = sources("experiments/d2d.py", f"--config.data.sources={mine}")
    assert replaced == {"mine": ("a.json", "pics", 1)}


@pytest.mark.parametrize("overrides", [(), ("--config.seed=1",)])
def test_error_in_the_code_of_an_experiment_keeps_its_traceback(overrides, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import math\n\n\ndef get_config():\n    return math.foo\n")
    with pytest.raises(AttributeError, match="module 'math' has no attribute 'foo'"):
        read_experiment(str(file), overrides)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("steps = 3", r"^--config: expected a file that defines get_config\(\), got '.*mine\.py'"),
        ("get_config = dict", r"mine\.py: expected a ConfigDict from get_config\(\), got dict$"),
    ],
)
def test_file_that_is_no_experiment(tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=message):
        read_experiment(str(tmp_path / "mine.py"), [])


def test_experiment_with_a_dataclass_of_its_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        """from __future__ import annotations
import dataclasses
from typing import ClassVar
from moddistill.config import TaskConfig, TrainConfig
from moddistill.configdict import to_config_dict

@dataclasses.dataclass
class Size:
    steps: int
    names: ClassVar[str] = ""

def get_config(arg):
    return to_config_dict(TrainConfig(steps=Size(int(arg)).steps))
"""
    )
    config, rest = read_experiment(f"{tmp_path}/mine.py:7", ["--config.seed=2", "--other", "3"])
    assert (config.steps, config.seed, rest) == (7, 2, ["--other", "3"])


def test_error_of_an_experiment_is_one_line(tmp_path):
    """The path of the experiment is relative, as it is typed."""
    workdir = tmp_path / "run"
    experiment = "experiments/init.py:pair=interleave"
    done = run("train", "--config", experiment, "--workdir", str(workdir))
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: stage init: expected a student .*, got 'llava-hf/.*'\n", done.stderr
    )
    assert not workdir.exists()


def test_error_of_a_command_is_one_line():
    done = run("generate", "--model", "runs/none/model", "--prompt", "hello")
    assert done.returncode == 1
    message = "expected a model folder, as a stage or an import writes it, or a Hugging Face folder"
    assert done.stderr.startswith(f"error: {message}, got 'runs/none/model' without")
    assert len(done.stderr.splitlines()) == 1
