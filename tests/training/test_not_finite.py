"""Runs whose parameters become infinite."""

import pytest

from moddistill.training import loop
from moddistill.training.metrics import read_metrics


@pytest.mark.parametrize(("save_every", "last_good"), [(1, "checkpoints/1"), (4, "none yet")])
def test_an_update_that_is_not_finite_stops_the_run(tiny_config, tmp_path, save_every, last_good):
    """The first update is zero, the second larger than float32, whenever it is reported."""
    optim = {"lr": 1e38, "warmup_ratio": 0.25}
    config = tiny_config("sft", save_every=save_every, log_every=save_every, optim=optim)
    with pytest.raises(FloatingPointError) as error:
        loop.train(config, tmp_path)
    assert str(error.value).startswith("step 2: param_norm is inf; the last good checkpoint is ")
    assert str(error.value).endswith(last_good)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["1"] * (save_every == 1)
    steps = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [1] * (save_every == 1)
    assert not (tmp_path / "model").exists()


def test_a_last_step_that_breaks_the_parameters_leaves_no_model(tiny_config, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 1: param_norm is inf; .* none yet"):
        loop.train(tiny_config("sft", steps=1, optim={"lr": 1e38}), tmp_path)
    assert not (tmp_path / "model").exists()
