import errno
import importlib
import re
import subprocess
import sys

import numpy as np
import pytest

from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.config import (
    CacheConfig,
    DataConfig,
    RecipeConfig,
    SourceConfig,
    TaskConfig,
    TrainConfig,
)
from moddistill.configdict import from_config_dict, to_config_dict
from moddistill.errors import UserError
from moddistill.params import flatten

_EXPERIMENT = ("config", "flagfile")
_RUN = (*_EXPERIMENT, "workdir", "coordinator", "processes", "process")
_MODEL = ("model", "dtype", "mesh")
_ANSWERS = (
    *_MODEL, "image", "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "stop", "seed",
)  # fmt: skip
FLAGS = {
    "train": _RUN,
    "recipe": _RUN,
    "plan": (*_EXPERIMENT, "topology", "json", "fit", "utilisation"),
    "extract": (
        *_EXPERIMENT, "out", "top_k", "samples", "backend", "coordinator", "processes", "process",
    ),
    "evaluate": (*_MODEL, "tasks", "task", "suite", "compare", "data", "include_path", "out"),
    "generate": (*_ANSWERS, "prompt", "jsonl", "out", "json", "logprobs"),
    "chat": _ANSWERS,
    "report": ("out", "title", "teacher"),
    "convert_weights": (),
}  # fmt: skip


def run(module, *args):
    importlib.import_module(f"moddistill.{module}").main(args)


def help_of(module, capsys, *args):
    with pytest.raises(SystemExit) as end:
        run(module, *args, "--help")
    assert end.value.code == 0
    return capsys.readouterr().out


def listed(text):
    """Names of the flags that a help text lists, in order, without `--help`."""
    return [name for name in re.findall(r"^  (?:-h, )?--([\w.]+)", text, re.M) if name != "help"]


def field_names(config, prefix):
    """Dotted names of the fields of a config dataclass, which has one source."""
    names = flatten(to_config_dict(config).to_dict())
    return [f"{prefix}.{name.replace('/', '.')}" for name in names]


@pytest.mark.parametrize("module", FLAGS)
def test_help_shows_the_flags_of_the_command_first_and_no_others(module, capsys):
    text = help_of(module, capsys)
    flags = listed(text)
    assert tuple(flags[: len(FLAGS[module])]) == FLAGS[module]
    assert all(flag.startswith("config.") for flag in flags[len(FLAGS[module]) :])
    assert text.startswith(f"usage: python -m {'tools' if module[:4] == 'conv' else 'moddistill'}.")


@pytest.mark.parametrize("module", ["train", "extract", "plan", "recipe"])
def test_help_shows_each_field_of_the_config_once(module, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tasks = {"NAME": TaskConfig()}
    config = TrainConfig(data=DataConfig(sources={"NAME": SourceConfig()}), tasks=tasks)
    if module == "recipe":
        caches = {"NAME": CacheConfig()}
        config = RecipeConfig(stages={"NAME": config}, caches=caches, tasks=tasks)
    text = help_of(module, capsys)
    shown = [flag for flag in listed(text) if flag.startswith("config.")]
    assert sorted(shown) == sorted(field_names(config, "config"))
    lr = "config.stages.NAME.optim.lr" if module == "recipe" else "config.optim.lr"
    assert f"  --{lr}=2e-05\n{' ' * 24}float >= 0: peak learning rate\n" in text
    assert f"{' ' * 24}none | matmuls | full: what layers save for the gradient" in text


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("import", "hf vision projector template select_layer seed out overwrite"),
        ("export", "model max_shard_size dtype vocabulary uniform out overwrite"),
        ("check", "engine"),
        ("inspect", ""),
    ],
)
def test_help_of_the_converter_shows_the_flags_of_each_command(command, flags, capsys):
    assert listed(help_of("convert_weights", capsys, command)) == flags.split()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--workdir", "x"], "expected --config, got no such argument"),
        (["train", "--config", "experiments/d2d.py"], "expected --workdir, got no such argument"),
        (["plan", "--topology", "cpu:1", "--config"], "--config: expected one argument"),
        (
            ["plan", "--topology=cpu:1", "--config=experiments/d2d.py", "--utilisation=3"],
            "--utilisation: expected >= 0.01 and <= 1, got 3",
        ),
        (
            ["plan", "--topology=cpu:1", "--config=experiments/d2d.py", "--config.seed=1", "--jsn"],
            r"--jsn is not a flag of this command \(did you mean '--json'\?\)",
        ),
        (
            ["train", "--config=experiments/d2d.py", "--workdir=x", "--processes", "two"],
            "--processes: expected a value of type int, got .two.",
        ),
        (["train", "--flagfile", "gone.txt"], "--flagfile: .*gone.txt"),
        (["generate", "--model=m", "--prompt=p", "--max_new_tokens=0"], "--max_new_tokens: exp"),
        (["evaluate", "--modle", "m"], "expected --out"),
        (["convert_weights", "imprt"], r".*: expected one of .*, got .imprt."),
    ],
)
def test_mistake_in_the_flags_is_one_line_with_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as end:
        run(*args)
    text = capsys.readouterr().err
    assert end.value.code == 2
    assert re.fullmatch(rf"error: {message}.*; see --help\n", text), text


def test_mistake_in_an_override_is_one_line_with_exit_code_1():
    with pytest.raises(SystemExit) as end:
        run("train", "--config=experiments/d2d.py", "--workdir=x", "--config.stepz=3")
    assert end.value.code == "error: config.stepz is not a setting (did you mean 'steps'?)"


def parse(*args):
    parser = Parser("", config=TrainConfig)
    parser.add_argument("--workdir")
    return parser.parse_args(args)


def test_flags_may_come_in_any_order_and_from_a_file(tmp_path):
    (tmp_path / "flags.txt").write_text("--workdir=runs/x\n--config.seed=5\n# a comment\n")
    args = ("--config.steps", "7", "--config", "experiments/d2s.py:tiny")
    for order in ((*args, f"--flagfile={tmp_path}/flags.txt"),
                  ("--flagfile", f"{tmp_path}/flags.txt", *args)):  # fmt: skip
        parsed = parse(*order)
        assert (parsed.workdir, parsed.config.seed, parsed.config.steps) == ("runs/x", 5, 7)


def test_words_after_the_flags_are_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("--config", "experiments/d2s.py:tiny", "--workdir", "x", "y")
    assert capsys.readouterr().err == "error: y is not a flag of this command; see --help\n"


def test_number_in_a_range():
    assert in_range(float, gt=0, le=1)("1e-2") == 0.01
    with pytest.raises(Exception, match="expected > 0 and <= 1, got nan"):
        in_range(float, gt=0, le=1)("nan")


def test_control_characters_of_an_error_are_escaped(capsys):
    for error in (UserError("a\x1b[2J\nb"), FileNotFoundError(2, "none", "a\x1b[2J\nb")):
        with pytest.raises(SystemExit) as end, user_errors():
            raise error
        assert end.value.code.startswith("error: a\\u001b[2J\nb")
    with pytest.raises(SystemExit, match="2"):
        parse("--config", "experiments/d2s.py:tiny", "--a\x1b[2J")
    assert "--a\\u001b[2J is not a flag" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), MemoryError()]
)
def test_lack_of_memory_is_one_line(error):
    message = r"^error: memory: expected enough .* got an error: [oR]"
    with pytest.raises(SystemExit, match=message), user_errors():
        raise error
    with pytest.raises(RuntimeError, match="another"), user_errors():
        raise RuntimeError("another error")


def test_only_user_errors_lose_their_traceback():
    with pytest.raises(SystemExit, match=r"error: config\.stepz is not a setting"), user_errors():
        from_config_dict(TrainConfig, {"stepz": 3})
    with pytest.raises(ValueError, match="broadcast"), user_errors():
        np.zeros(2) + np.zeros(3)
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "error: output: No space left on device",
        ),
        (
            OSError(errno.EISDIR, "Is a directory", ".a.partial", None, "a"),
            "error: a: Is a directory",
        ),
        (
            ValueError("os_error_code='24' Too many open files"),
            "error: descriptors: expected enough",
        ),
        (KeyboardInterrupt(), 130),
    ],
    ids=str,
)
def test_errors_of_the_system_are_one_line(error, code):
    with pytest.raises(SystemExit) as end, user_errors():
        raise error
    assert str(end.value.code).startswith(str(code))


def test_output_that_nobody_reads_ends_a_command_quietly():
    script = (
        "from moddistill.cli.parser import user_errors\n"
        "with user_errors():\n    while True: print('x' * 1000)"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True)
    run.stdout.readline()
    run.stdout.close()
    assert (run.stderr.read(), run.wait(20)) == ("", 141)
    run.stderr.close()


def test_control_characters_in_the_name_of_a_setting_are_refused():
    with pytest.raises(SystemExit, match=r"^error: --config: expected the name of a setting, got"):
        run(
            "train", "--config", "experiments/sft.py:tiny", "--workdir", "x", "--config.\x1b[31mx=1"
        )
