"""Signals that reach a run at moments when no step is computed."""

import os
import shutil
import signal
import time

import pytest

from moddistill.data.pipeline import Batches
from moddistill.errors import StoppedError
from moddistill.training import checkpoint, loop
from moddistill.training.metrics import read_metrics


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """The config and the workdir of a whole run."""
    config, workdir = tiny_config("sft"), tmp_path_factory.mktemp("sft")
    loop.train(config, workdir)
    return config, workdir


def losses(workdir):
    return [(row["step"], row["loss"]) for row in read_metrics(workdir / "metrics.jsonl")]


def test_sigterm_stops_a_run_that_has_all_its_steps(trained, tmp_path, monkeypatch):
    """While its last checkpoint is read; or a recipe would begin its next stage."""
    config, whole = trained
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "model")
    restore = checkpoint.restore

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return restore(*args)

    monkeypatch.setattr(checkpoint, "restore", interrupted)
    with pytest.raises(StoppedError, match="stopped after step 4"):
        loop.train(config, tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_signal_while_records_are_made_loses_none(trained, tmp_path, monkeypatch):
    """Whether they were made before it was noticed or not."""
    config, whole = trained
    take, taken = Batches.__next__, []

    def interrupted(batches):
        made = take(batches)
        taken.append(made)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return made

    with monkeypatch.context() as patched, pytest.raises(StoppedError, match="after step 2, while"):
        patched.setattr(Batches, "__next__", interrupted)
        loop.train(config, tmp_path)
    loop.train(config, tmp_path)
    assert losses(tmp_path) == losses(whole)
