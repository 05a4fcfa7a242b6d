import json
import math

import jax
import jax.numpy as jnp
import pytest

from moddistill.errors import UserError
from moddistill.models.flops import StepFlops
from moddistill.training.metrics import MetricsLog, check_finite, read_metrics, weighted_means


def flops(size):
    """Of 10 GFLOP for a token of the student, and of the teacher as much as all other content."""
    rest = size.squared_lengths + 2 * size.images + 4 * size.supervised
    return StepFlops(student=1e10 * size.tokens, teacher=1e9 * rest)


def step(loss, weight, tokens=100, **content):
    scalars = {
        "loss": (loss * weight, weight),
        "tokens": (tokens, 1),
        "squared_lengths": (0, 1),
        "images": (0, 1),
        "supervised": (0, tokens),
        "diverged": (0, 1),
    }
    return {name: tuple(map(jnp.float32, pair)) for name, pair in (scalars | content).items()}


def test_means_are_weighted():
    # (2 * 1 + 5 * 3) / 4
    assert weighted_means([step(2, 1), step(5, 3)])["loss"] == 17 / 4


def test_mean_without_weight_is_nan():
    assert math.isnan(weighted_means([step(0, 0)])["loss"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_metric_stops_the_run(bad):
    check_finite({"loss": (1.0, 1.0), "kd": (2.0, 1.0)}, 7, "none yet")
    with pytest.raises(FloatingPointError, match=f"step 7: kd is {bad}; .* is runs/a/4"):
        check_finite({"kd": (bad, 1.0), "loss": (1.0, 1.0)}, 7, "runs/a/4")


def test_diverged_step_is_named_and_no_row_is_written(tmp_path):
    with MetricsLog(tmp_path, start=4, steps=8, title="sft", flops=flops) as log:
        for loss in (1.0, math.nan, math.nan):
            log.add(step(loss, 1))
        with pytest.raises(FloatingPointError, match="step 6: loss is nan"):
            log.report(7, 0.5, "none yet")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_report_writes_one_row_of_means(tmp_path):
    with MetricsLog(tmp_path, start=0, steps=4, title="sft", flops=flops) as log:
        for loss in (1.0, 3.0):
            log.add(step(loss, 1))
        log.report(2, 0.5, "none yet")
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert (row["step"], row["loss"], row["lr"]) == (2, 2.0, 0.5)
    # 200 tokens in the time the row covers.
    assert row["tokens_per_second"] == pytest.approx(200 / row["seconds"])
    assert list((tmp_path / "tensorboard").iterdir())


def test_nothing_to_report_writes_nothing(tmp_path):
    with MetricsLog(tmp_path, start=0, steps=4, title="sft", flops=flops) as log:
        log.add(step(1.0, 1))
        for _ in range(2):
            log.report(1, 0.5, "none yet")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_metric_without_samples_is_left_out(tmp_path):
    """JSON has no NaN."""
    with MetricsLog(tmp_path, start=0, steps=4, title="sft", flops=flops) as log:
        log.add(step(1.0, 1, kd=(0, 0)))
        log.report(1, 0.5, "none yet")
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert "kd" not in row and row["loss"] == 1.0
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "line", ['{"step": "x"}', '{"step": 1, "loss": []}', "[" * 100_000, '{"loss": 1}', "\0" * 9]
)
def test_damaged_row_is_named(line, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        read_metrics(file)


def test_rows_that_are_made_again_are_logged(tmp_path, caplog):
    rows = [{"step": number, "loss": 1.0, "seconds": 1.0} for number in range(1, 6)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with MetricsLog(tmp_path, start=3, steps=8, title="sft", flops=flops):
        pass
    assert "rows of steps 4 to 5 are removed" in caplog.text


def test_a_run_that_skips_all_steps_fails(tmp_path):
    with MetricsLog(tmp_path, 0, 3, "sft", flops, max_skipped=20) as log:
        for _ in range(3):
            log.add(step(0.0, 0, diverged=(1, 1)))
        with pytest.raises(FloatingPointError, match="more than 2 steps in a row diverged"):
            log.report(3, 0.5, "none yet")


def test_host_is_one_step_ahead_of_the_device(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(float(x["loss"][0])))
    with MetricsLog(tmp_path, start=0, steps=4, title="sft", flops=flops) as log:
        for number in (1.0, 2.0, 3.0):
            assert waited == [1.0, 2.0][: max(0, int(number) - 2)]
            log.add(step(number, 1))
    assert waited == [1.0, 2.0]


def test_throughput_is_that_of_what_the_steps_contain(tmp_path):
    """Two steps of different content, 300 tokens together."""
    log = MetricsLog(tmp_path, 0, 4, "d2d", flops, peak_flops=1e13)
    one = {"squared_lengths": (5000, 1), "images": (3, 1), "supervised": (50, 200)}
    two = {"squared_lengths": (1000, 1), "images": (1, 1), "supervised": (40, 100)}
    with log:
        log.add(step(1, 1, tokens=200, **one))
        log.add(step(1, 1, tokens=100, **two))
        log.report(2, 0.5, "none yet")
    [row] = read_metrics(tmp_path / "metrics.jsonl")
    assert row["tokens_per_second"] * row["seconds"] == pytest.approx(300)
    assert row["student_tflops"] * row["seconds"] == pytest.approx(3.0)
    # 5,000 + 1,000, twice 3 + 1, four times 50 + 40.
    assert row["teacher_tflops"] * row["seconds"] == pytest.approx(6.368)
    assert row["mfu"] == pytest.approx(9.368 / row["seconds"] / 10)
    assert row["supervised"] == pytest.approx(0.3)
    assert not row.keys() & {"tokens", "squared_lengths", "images"}


def test_rows_after_the_last_checkpoint_are_removed_and_seconds_continue(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "loss": 1.0, "seconds": 10.0 * n} for n in (1, 2, 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with MetricsLog(tmp_path, start=2, steps=4, title="sft", flops=flops) as log:
        log.add(step(4, 1))
        log.report(3, 0.0, "none yet")
    written = read_metrics(file)
    assert [row["step"] for row in written] == [1, 2, 3]
    assert written[-1]["loss"] == 4.0
    assert 20 < written[-1]["seconds"] < 30


def test_rows_of_held_out_records_stay_up_to_the_last_checkpoint(tmp_path):
    """They are written before it."""
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": 2, "loss": 1.0, "seconds": 10.0}, {"step": 2, "heldout_loss": 1.0}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1] | {"step": 4}]))
    with MetricsLog(tmp_path, start=2, steps=4, title="sft", flops=flops) as log:
        assert log.evaluated == rows[1:]
        log.write_evaluation(3, {"heldout_loss": 2.0})
    assert read_metrics(file) == [*rows, {"step": 3, "heldout_loss": 2.0}]
    assert log.evaluated == [rows[1], {"step": 3, "heldout_loss": 2.0}]


def test_loss_beyond_the_factor_stops_the_run(tmp_path):
    with MetricsLog(tmp_path, start=4, steps=8, title="sft", flops=flops) as log:
        for count in (0, 1, 1):
            log.add(step(7.0, 2, diverged=(count, 1), param_norm=(2e6, 1)))
        message = "step 6: the loss, 7, or the norm of the parameters, 2e[+]06, rose beyond"
        with pytest.raises(FloatingPointError, match=message):
            log.report(7, 0.5, "runs/a/4")
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_skipped_steps_are_counted_and_only_so_many_in_a_row(tmp_path):
    skipped, normal = step(0.0, 0, diverged=(1, 1)), step(3.0, 1)
    with MetricsLog(tmp_path, 0, 8, "sft", flops, max_skipped=2) as log:
        for each in (normal, skipped, skipped, normal, skipped):
            log.add(each)
        log.report(5, 0.5, "none yet")
        log.add(skipped)
        log.report(6, 0.5, "none yet")
        log.add(skipped)
        with pytest.raises(FloatingPointError, match="step 7: more than 2 steps in a row diverged"):
            log.report(7, 0.5, "none yet")
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["loss"], first["skipped"]) == (3.0, 3)
    assert "loss" not in second and second["skipped"] == 1


def test_incomplete_last_line_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.0, "seconds": 1.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(file)] == [1]
    with MetricsLog(tmp_path, start=1, steps=4, title="sft", flops=flops) as log:
        log.add(step(4, 1))
        log.report(2, 0.0, "none yet")
    assert [row["step"] for row in read_metrics(file)] == [1, 2]


@pytest.mark.parametrize("line", ["{", "[1]", "", '{"loss": 1.0}', '{"step": 2, "loss": "x"}'])
def test_broken_line_is_named(line, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    message = r"metrics\.jsonl, line 2: expected a JSON object of numbers with a step \(the run can"
    with pytest.raises(ValueError, match=message) as error:
        read_metrics(file)
    assert str(error.value).endswith(f"got {line!r}")


def test_missing_metrics_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
