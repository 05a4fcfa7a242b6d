"""A run with losses at image positions."""

import pytest

from moddistill.models.flops import StepSize, step_flops
from moddistill.training import loop
from moddistill.training.architectures import resolve_models
from moddistill.training.metrics import read_metrics


@pytest.mark.slow
def test_run_reports_the_terms_and_their_flops(tiny_config, tmp_path, monkeypatch):
    [source] = tiny_config("d2s").data.sources.values()
    config = tiny_config(
        "d2s",
        steps=2,
        remat="none",
        heldout_steps=1,
        data={"heldout": source},
        distillation={"image_kd_weight": 1.0, "relation_weight": 0.5},
    )
    runs, prepare = [], loop.prepare
    monkeypatch.setattr(loop, "prepare", lambda *args: runs.append(prepare(*args)) or runs[-1])
    loop.train(config, tmp_path)
    *rows, heldout = read_metrics(tmp_path / "metrics.jsonl")
    names = {"kd", "ce", "image_kd", "relation"}
    for row in rows:
        assert row.keys() >= names and row["image_kd"] > 0 and 0 < row["relation"] < 1
    assert heldout.keys() >= {f"heldout_{name}" for name in names}
    models = resolve_models(config)
    both = models.student_config, models.teacher_config
    size, trained = StepSize(50.0, 900.0, 2.0, 8.0), set(runs[0].state.params)
    assert runs[0].flops(size) == step_flops(*both, size, trained, False, image_logits=True)
