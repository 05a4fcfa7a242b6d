"""Runs the files and commands of docs/experiments.md, with the smallest models."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from experiments import common
from moddistill import convert_weights, evaluate, plan, recipe, train
from moddistill.convert.resolve import load
from moddistill.storage.model_folder import read_model_config, save_model

PAGE = Path("docs/experiments.md").read_text()
SMALL = {"batch_size": 8, "steps": 2, "dtype": "float32", "data.max_length": 200}
FILES = dict(re.findall(r"`(\S+)`:\n```\w+\n(.*?)```", PAGE, re.S))
COMMANDS = [
    tuple(shlex.split(line)[2:])  # after `python -m`
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.replace("\\\n", " ").splitlines()
]


def small(prefix=""):
    """Overrides that make a stage of the page small."""
    return [f"--config.{prefix}{name}={value}" for name, value in SMALL.items()]


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_architecture, init, tokenizer):
    """The current folder, with what the page says: its files, models, records and images."""
    for seed, (name, preset) in enumerate({"student": "tiny", "teacher": "tiny-teacher"}.items()):
        config = dataclasses.replace(tiny_architecture(preset), template="chatml")
        save_model(tmp_path / "models" / name, config, init(config, seed), tokenizer, {})
    data = tmp_path / "data"
    shutil.copytree(common.tiny_data(), data / "images")
    (data / "images" / "0.png").rename(data / "images" / "cat.png")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for name in ("conversations", "pairs"):
        [record] = json.loads((data / f"{name}.json").read_text())
        (data / f"{name}.json").write_text(json.dumps([record] * 8))
    shutil.copy(data / "conversations.json", data / "more.json")
    monkeypatch.chdir(tmp_path)


def command(module):
    """The arguments of the one command of the page that runs a module."""
    [args] = [args for name, *args in COMMANDS if name == module]
    return args


def test_page_has_the_files_and_commands_that_are_tested():
    records = {f"data/{name}.json" for name in ("conversations", "pairs", "questions")}
    assert set(FILES) == {*records, "mine.py", "my_task.py"}
    known = (
        "tools.convert_weights",
        *(f"moddistill.{x}" for x in ("plan", "train", "recipe", "evaluate")),
    )
    assert {name for name, *_ in COMMANDS} == set(known)


def test_commands_of_the_converter_have_these_flags():
    commands = [args for name, *args in COMMANDS if name == "tools.convert_weights"]
    assert [args[0] for args in commands] == ["import", "import", "export"]
    for args in commands:
        convert_weights._parser().parse_args(args)


def test_the_stage_of_the_page_can_be_planned(project, capsys):
    args = [arg.replace("h100:1", "cpu:1") for arg in command("moddistill.plan")]
    plan.main([*args, "--json", *small()])
    assert json.loads(capsys.readouterr().out)["topology"] == "cpu:1"


def test_the_stage_of_the_page_trains_with_the_added_records(project):
    train.main([*command("moddistill.train"), *small()])
    run = json.loads(Path("runs/trial/config.json").read_text())
    assert set(run["data"]["sources"]) == {"conversations", "more"}
    assert (run["optim"]["lr"], run["steps"]) == (1e-5, 2)
    assert not Path("runs/trial/quarantine.jsonl").exists()
    load("runs/trial/model")


def test_the_recipe_of_the_page_is_accepted(project, monkeypatch):
    found = []

    def check(config, workdir):
        recipe.check_recipe(config, workdir)
        found.append(config)

    monkeypatch.setattr(recipe, "run", check)
    recipe.main([*command("moddistill.recipe"), *small("stages.d2s.")])
    [config] = found
    assert config.order == ("init", "d2d", "d2s", "preference")
    assert config.stages["d2s"].moe.num_experts == 8
    made = {"models/student", *(f"runs/mine/{stage}/model" for stage in config.order)}
    assert all(stage.student in made for stage in config.stages.values())
    assert read_model_config("models/teacher").template == config.stages["d2d"].data.template


def test_the_task_of_the_page_is_evaluated(project, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path.cwd())
    args = [
        arg.replace("runs/mine/preference/model", "models/student")
        for arg in command("moddistill.evaluate")
    ]
    evaluate.main([*args, "--mesh", "data=8"])
    assert set(json.loads(capsys.readouterr().out)) == {"accuracy"}
    rows = Path("runs/mine/my_task/predictions.jsonl").read_text().splitlines()
    assert [json.loads(row)["id"] for row in rows] == ["a", "b"]
