"""The wheel by itself: built, installed into an empty environment, used outside the checkout."""

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moddistill.convert.exporting import export_model

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("train", "recipe", "plan", "prepare", "evaluate", "generate", "chat", "convert"),
    *("report", "explore", "extract"),
)
EXPERIMENT = """
from moddistill.config import DataConfig, SourceConfig, TrainConfig
from moddistill.configdict import to_config_dict


def get_config():
    records = SourceConfig(path="records.json", images=".")
    return to_config_dict(
        TrainConfig(
            stage="sft",
            student="imported",
            steps=1,
            batch_size=2,
            data=DataConfig(sources={"mine": records}, max_length=256),
        )
    )
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools writes into the folder that it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "moddistill", source / "moddistill")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source)
    [file] = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """`run(command, *args)`: what a console script prints, in a folder outside the checkout.

    The environment has the dependencies of this one, but neither the checkout nor its editable
    installation.
    """
    folder = tmp_path_factory.mktemp("outside")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    [packages] = (folder / "env" / "lib").glob("python*/site-packages")
    # Folders named in a .pth file are searched, their own .pth files are not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    python = folder / "env" / "bin" / "python"
    pip("--python", python, "install", "--no-index", "--no-deps", wheel)
    variables = {"HOME": str(folder), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

    def run(command, *args):
        done = subprocess.run(
            [folder / "env" / "bin" / command, *map(str, args)],
            cwd=folder,
            env=variables | {name: os.environ[name] for name in ("PATH", "XLA_FLAGS")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder
    return run


def pip(*args):
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *args], check=True)


def test_wheel_holds_only_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"moddistill"}
    assert "moddistill/py.typed" in names
    files = (x for x in (ROOT / "moddistill").rglob("*") if x.is_file() and x.suffix != ".pyc")
    in_wheel = {name for name in names if name.startswith("moddistill/")}
    assert in_wheel == {x.relative_to(ROOT).as_posix() for x in files}


def test_every_command_has_a_script(run):
    scripts = {x.name for x in (run.folder / "env" / "bin").glob("moddistill-*")}
    assert scripts == {f"moddistill-{name}" for name in COMMANDS}
    # The plug-in of lmms-eval is not among them: it needs torch.
    distribution = "importlib.metadata.distribution('moddistill')"
    commands = f"{distribution}.entry_points.select(group='console_scripts')"
    program = f"import importlib.metadata\nfor x in {commands}: x.load()"
    run("python", "-c", program)


def test_help_names_the_command_as_it_was_called(run):
    assert run("moddistill-convert", "--help").startswith("usage: moddistill-convert [-h]")
    for module in ("tools.convert_weights", "moddistill.convert_weights"):
        command = [sys.executable, "-m", module, "--help"]
        shown = subprocess.check_output(command, cwd=ROOT, text=True)
        assert shown.startswith(f"usage: python -m {module} [-h]")


def test_wheel_converts_trains_and_generates_outside_the_checkout(run, tiny_models):
    export_model(tiny_models["dense"], run.folder / "hf", max_shard_size=10**9)
    run("moddistill-convert", "import", "--hf", "hf", "--out", "imported")
    Image.fromarray(np.full((20, 28, 3), 99, np.uint8)).save(run.folder / "grey.png")
    turns = [
        {"from": "human", "value": "<image>\nwhat colour is it?"},
        {"from": "gpt", "value": "grey"},
    ]
    record = {"id": "0", "image": "grey.png", "conversations": turns}
    (run.folder / "records.json").write_text(json.dumps([record] * 2))
    (run.folder / "mine.py").write_text(EXPERIMENT)
    run("moddistill-train", "--config", "mine.py", "--workdir", "runs/mine")
    prompt = ("--prompt", "what colour is it?", "--image", "grey.png", "--max_new_tokens", 2)
    answer = json.loads(run("moddistill-generate", "--model", "runs/mine/model", *prompt, "--json"))
    assert isinstance(answer["text"], str)
    location = "import moddistill; print(moddistill.__file__)"
    assert run("python", "-c", location).startswith(str(run.folder / "env"))
