"""Metrics of held-out records: when they are taken, of what, and which checkpoint they keep."""

import dataclasses
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.data.pipeline import Batches
from moddistill.distributed import sharding
from moddistill.errors import StoppedError
from moddistill.training import loop
from moddistill.training.heldout import Heldout
from moddistill.training.interruption import Stops
from moddistill.training.metrics import read_metrics
from moddistill.training.state import State


@pytest.mark.slow
def test_heldout_records_are_evaluated_after_the_last_step(tiny_config, tmp_path):
    config = tiny_config("preference")
    [source] = config.data.sources.values()
    data = dataclasses.replace(config.data, heldout=source)
    loop.train(dataclasses.replace(config, data=data, heldout_steps=1), tmp_path)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last.keys() >= {"step", "heldout_loss", "heldout_reward_accuracy"}
    assert 0 <= last["heldout_reward_accuracy"] <= 1


def kept_by(tiny_config, workdir, name):
    """Trains four steps, each with a checkpoint, of which the newest and the best are kept."""
    config = tiny_config("sft", steps=4, save_every=1, heldout_steps=1, heldout_every=1)
    [source] = config.data.sources.values()
    data = dataclasses.replace(config.data, heldout=source)
    config = dataclasses.replace(config, data=data, keep_last=1, keep_best=name)
    loop.train(config, workdir)
    rows = read_metrics(workdir / "metrics.jsonl")
    scores = {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
    return scores, sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.slow
def test_best_checkpoint_is_kept(tiny_config, tmp_path):
    scores, kept = kept_by(tiny_config, tmp_path, "loss")
    assert list(scores) == [1, 2, 3, 4]
    assert kept == sorted({min(scores, key=scores.get), 4})


def test_best_by_a_metric_that_does_not_exist_is_refused_before_the_first_step(
    tiny_config, tmp_path
):
    with pytest.raises(ValueError, match=r"config\.keep_best: expected one of .*loss.*'lss'"):
        kept_by(tiny_config, tmp_path, "lss")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


class Records(Batches):
    """A stream of a few batches."""

    def __init__(self, batches):  # without those of a pipeline
        self.batches = batches

    def seek(self, row):
        self.rest = iter(self.batches[row:])

    def __next__(self):
        return next(self.rest)

    def close(self):
        pass


def test_heldout_batches_are_evaluated_in_micro_batches(tiny_config):
    """Two batches of sixteen samples in halves; a mean over all of them."""
    sizes = []

    class Loss:
        def __call__(self, params, frozen, teacher, batch, rng):
            sizes.append(batch["x"].shape)
            return 0.0, {"x": (batch["x"].sum(), batch["x"].size)}

    config = tiny_config("sft", batch_size=16, grad_accum_steps=2, heldout_steps=2)
    state = State(
        step=jnp.zeros((), jnp.int32), params={}, frozen={}, opt_state=(), mean_loss=jnp.float32(1)
    )
    records = Records([{"x": np.arange(16.0)}, {"x": np.arange(16.0) * 3}])
    run = loop.Run(model=None, loss=Loss(), step=None, state=state, teacher=None, flops=None)
    heldout = Heldout(config, run, records, sharding.make_mesh(config.mesh))
    assert [heldout(state, Stops()) for _ in range(2)] == [
        {"heldout_x": 15.0}
    ] * 2  # the same batches
    assert sizes == [(8,)]  # compiled once


@pytest.mark.slow
def test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_up_for(
    tiny_config, tmp_path, monkeypatch
):
    config = tiny_config("sft", steps=3, heldout_steps=3, heldout_every=2)
    [source] = config.data.sources.values()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, heldout=source))
    loop.train(config, tmp_path / "whole")
    is_due = Heldout.is_due

    def interrupted(heldout, step):
        if is_due(heldout, step):
            os.kill(os.getpid(), signal.SIGTERM)
        return is_due(heldout, step)

    with monkeypatch.context() as patched, pytest.raises(StoppedError, match="after step 2"):
        patched.setattr(Heldout, "is_due", interrupted)
        loop.train(config, tmp_path / "run")
    loop.train(config, tmp_path / "run")
    means = [
        [(row["step"], row["heldout_loss"]) for row in read_metrics(file) if "heldout_loss" in row]
        for file in sorted(tmp_path.glob("*/metrics.jsonl"))
    ]
    assert means[0] == means[1] and [step for step, _ in means[0]] == [2, 3]
