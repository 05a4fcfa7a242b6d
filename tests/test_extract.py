"""The command: a cache is made, a stage trains and is planned from it."""

import subprocess
import sys

import pytest

from moddistill import extract, plan
from moddistill.training.loop import train


@pytest.mark.slow
def test_a_stage_trains_and_is_planned_from_the_cache_that_the_command_makes(
    tiny_config, tmp_path, capsys
):
    folder, config = tmp_path / "cache", tiny_config("d2s", teacher=f"cache:{tmp_path / 'cache'}")
    flags = ("--config", "experiments/d2s.py:tiny", "--out", str(folder), "--samples", "4")
    command = [sys.executable, "-m", "moddistill.extract", *flags]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "8 records, 42 tokens with targets" in made.stderr
    assert f"config.teacher=cache:{folder}" in made.stderr
    assert (train(config, tmp_path / "run") / "model.json").is_file()
    cached = f"--config.teacher={config.teacher}"
    plan.main(["--config", "experiments/d2s.py:tiny", cached, "--topology", "cpu:8", "--json"])
    assert '"teacher_flops_per_step": 0.0' in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--top_k", "0"), ("--top_k", "4", "--samples", "4")])
def test_flags_that_mean_nothing_are_refused(tmp_path, flags, capsys):
    with pytest.raises(SystemExit):
        extract.main(
            ["--config", "experiments/d2s.py:tiny", "--out", str(tmp_path / "cache"), *flags]
        )
    assert "--top_k" in capsys.readouterr().err and not (tmp_path / "cache").exists()
