import jax
import pytest

from moddistill.config import MeshConfig
from moddistill.distributed.accelerators import CHIPS
from moddistill.distributed.sharding import make_mesh
from moddistill.models.flops import StepSize
from moddistill.models.presets import preset
from moddistill.planning import planner
from moddistill.planning.on_policy import answer_work
from moddistill.planning.roofline import AnswerSize, least_seconds, prefill_work, token_work

CONTENT = StepSize(tokens=1600, squared_lengths=2e5, images=32, supervised=400)


@pytest.fixture
def config(tiny_config):
    """The student answers 16 of 32 rows, in two micro-batches."""
    return tiny_config(
        "d2s",
        batch_size=32,
        grad_accum_steps=2,
        data={"packing": False},
        on_policy={"share": 0.5, "tokens": 12},
    )


def test_work_of_answers(config):
    """Prompts have 3/4 of 50 tokens, rounded up. Four devices make two answers each, twice."""
    student, mesh = preset("tiny"), make_mesh(MeshConfig(data=4), jax.devices()[:4])
    found = answer_work(config, student, CONTENT, mesh, "v5e:2x2")
    size = AnswerSize(16, 38, 1, 12)
    prefill, token = (work(student, size, "float32") for work in (prefill_work, token_work))
    assert found["answer_prompt_flops_per_step"] == prefill.flops
    assert found["answer_flops_per_step"] == prefill.flops + 11 * token.flops
    token = token_work(student, size._replace(rows=2), "float32")
    seconds = least_seconds(token, CHIPS["v5e"])
    assert found["answer_token_seconds_per_step"] == pytest.approx(2 * 11 * seconds)
    assert answer_work(config, student, CONTENT, mesh, "cpu:4") == found | {
        "answer_token_seconds_per_step": None
    }


@pytest.mark.slow
def test_answers_are_part_of_the_plan(config):
    report = planner.plan(config, "cpu:8")
    held = report["arguments"]["moments"] + report["arguments"]["teacher"]
    assert report["answer_peak_bytes_per_chip"] > held + report["arguments"]["trained"]
    text = planner.format_report(report)
    assert "TFLOP a step, 16 of at most 12 tokens\nanswers " in text
    assert "GiB at their peak" in text


@pytest.mark.parametrize(("peak", "fits"), [(1, True), (10**12, False), (None, False)])
def test_a_step_fits_if_its_answers_do(peak, fits):
    report = {
        "chips": 4,
        "steps": 10,
        "peak_bytes_per_chip": 1,
        "answer_peak_bytes_per_chip": peak,
        "model_flops_per_step": 1e15,
        "teacher_flops_per_step": 1e15,
        "answer_prompt_flops_per_step": 2e15,
        "answer_token_seconds_per_step": 3.0,
    }
    found = planner._fit_and_duration(report, "v5e:2x2", 0.5)
    assert found["fits"] == fits
    seconds = 4e15 / (4 * CHIPS["v5e"].flops * 0.5) + 3.0
    assert found["seconds_per_step"] == pytest.approx(seconds)
    assert found["days"] == pytest.approx(10 * seconds / 86400)


def test_fit_tries_micro_batches_whose_share_is_whole(config, monkeypatch):
    """32 rows on 4 devices, of which the student answers half: 8, 4 or 2 at one time, but not 1."""
    tried = []

    def fake_plan(candidate, *_):
        tried.append(candidate.grad_accum_steps)
        return {"fits": False}

    monkeypatch.setattr(planner, "plan", fake_plan)
    monkeypatch.setattr(planner.accelerators, "topology_devices", lambda _: jax.devices()[:4])
    planner.fit(config, "v5e:2x2")
    assert tried == [1, 2, 4]
