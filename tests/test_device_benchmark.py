import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import device, device_checks, device_operations
from benchmarks.device import Section
from benchmarks.device_checks import relative_errors, verdict
from benchmarks.device_inputs import on, random_leaves
from moddistill.distributed.sharding import replicated
from moddistill.models import attention_kernels
from moddistill.training.stages import STAGES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Exit code, figures and table of the whole benchmark at the smallest size."""
    out = tmp_path_factory.mktemp("device") / "new" / "device.json"
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        code = device.main(["--minutes", "60", "--out", str(out)])
    return code, json.loads(out.read_text()), stdout.getvalue()


def test_every_section_runs_and_every_check_passes(run):
    code, report, _ = run
    status = {name: entry["status"] for name, entry in report["sections"].items()}
    assert status == {
        "operations": "passed",
        "stages": "passed",
        "d2s step": "measured",
        "packed d2s step": "measured",
        "ceilings": "measured",
        "expert layer": "measured",
        "decoding": "measured",
        "second d2s step": "skipped",
    }
    assert code == 0
    checks = report["sections"]["operations"]["checks"] + report["sections"]["stages"]["checks"]
    assert all(check["passed"] for check in checks)
    assert {check["name"] for check in checks} == {
        "KL and cross entropy",
        "preference losses",
        "attention of the decoder, one segment",
        "attention of the decoder, packed",
        "attention of decoding",
        "attention of the vision encoder",
        "expert layer, dropless",
        "expert layer, capacity",
        *(f"step of {stage}" for stage in STAGES),
    }
    assert report["device"]["versions"]["jax"] == jax.__version__


def test_figures_of_the_step(run):
    step = run[1]["sections"]["d2s step"]
    assert step["tokens"] == 4 * 64
    assert step["planned_peak_bytes"] > 0
    assert step["measured_peak_bytes"] is None  # CPUs do not count it
    assert len(step["all_seconds"]) == 10
    assert step["samples"] == 4
    packed = run[1]["sections"]["packed d2s step"]
    assert packed["tokens"] == 4 * 64
    assert packed["samples"] > 4
    assert step["student_flops"] > step["teacher_flops"] > 0


def test_table_names_every_section_in_three_columns(run):
    _, report, table = run
    lines = table.strip().splitlines()
    assert lines[:2] == ["| device | what | figure |", "|---|---|---|"]
    assert all(line.count(" | ") == 2 for line in lines[2:])
    for what in ("step of d2s", "d2s step, tiny", "bfloat16 matmul", "expert layer, 256 tokens"):
        assert what in table
    assert "| second d2s step | skipped: no second pair fits this device |" in table
    assert sum("decoding, " in line for line in lines) == 4
    assert len(lines) > len(report["sections"])


def only(monkeypatch, *sections):
    monkeypatch.setattr(device, "SECTIONS", sections)


def test_broken_attention_fails_its_check_and_the_command(monkeypatch, tmp_path, capsys):
    attend = attention_kernels.attend
    monkeypatch.setattr(attention_kernels, "attend", lambda q, *rest: attend(1.05 * q, *rest))
    operations = [
        device_operations.vision_attention(2, 25, 4, 4, 8),
        device_operations.pair_losses(),
    ]
    monkeypatch.setattr(device_checks, "operations", lambda tiny: operations)
    only(monkeypatch, Section("operations", 1.0, device_checks.check_operations))
    out = tmp_path / "device.json"
    assert device.main(["--out", str(out)]) == 1
    [section] = json.loads(out.read_text())["sections"].values()
    assert section["status"] == "failed"
    failed = {check["name"] for check in section["checks"] if not check["passed"]}
    assert failed == {"attention of the vision encoder"}
    assert "FAILED, float32 by XLA against its plain form" in capsys.readouterr().out


def test_operation_that_raises_is_a_failed_check(monkeypatch):
    def broken(*_, dtype):
        raise RuntimeError("no kernel\nfor this")

    operation = device_operations.pair_losses()
    operations = [operation._replace(ours=broken), operation]
    monkeypatch.setattr(device_checks, "operations", lambda tiny: operations)
    section = device_checks.check_operations(jax.devices()[0], True, lambda: 1.0)
    assert section["status"] == "failed"
    first, second = section["checks"]
    assert first["raised"] == "RuntimeError: no kernel"
    assert "Traceback" in first["traceback"]
    assert second["passed"]


def test_section_that_raises_is_recorded_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise MemoryError("out of | memory\nat line 2")

    works = Section("works", 0.5, lambda *_: {"table": [["speed", "1 m/s"]]})
    only(monkeypatch, Section("breaks", 0.5, broken), works)
    out = tmp_path / "device.json"
    assert device.main(["--out", str(out)]) == 1
    sections = json.loads(out.read_text())["sections"]
    assert sections["breaks"]["status"] == "raised"
    assert "at line 2" in sections["breaks"]["traceback"]
    assert sections["works"]["status"] == "measured"
    table = capsys.readouterr().out
    assert "| breaks | raised: MemoryError: out of \\| memory |" in table
    assert "| speed | 1 m/s |" in table


def test_section_without_time_is_skipped_by_name(monkeypatch, tmp_path, capsys):
    clock = iter([0.0, 0.0, 0.0, 0.0, 50.0, 50.0, 50.0, 50.0])
    monkeypatch.setattr(device.time, "monotonic", lambda: next(clock))
    done = lambda *_: {}  # noqa: E731
    only(monkeypatch, Section("first", 0.4, done), Section("second", 0.6, done))
    assert device.main(["--minutes", "1", "--out", str(tmp_path / "device.json")]) == 0
    table = capsys.readouterr().out
    assert "| second | skipped: 10 s are left for it, it needs 18 s |" in table


@pytest.mark.parametrize(("status", "code"), [("passed", 0), ("incomplete", 2), ("failed", 1)])
def test_exit_code_is_that_of_the_checks(status, code, monkeypatch, tmp_path):
    only(monkeypatch, Section("stages", 1.0, lambda *_: {"status": status}))
    assert device.main(["--out", str(tmp_path / "device.json")]) == code


def test_check_without_time_is_skipped_and_not_passed():
    section = device_checks.check_operations(jax.devices()[0], True, lambda: 0.0)
    assert section["status"] == "incomplete"
    assert len(section["table"]) == 9
    assert section["table"][0][1] == "skipped, out of time"


@pytest.mark.parametrize(("value", "passes"), [(1.0, True), (1.1, False), (float("nan"), False)])
def test_error_must_be_a_number_within_the_bound(value, passes):
    errors = relative_errors({"a": value, "b": 2.0}, {"a": 1.0, "b": 2.0})
    check = verdict("x", "float32", "y", errors, 1e-2)
    assert check["passed"] is passes
    assert check["where"] == "a"
    json.dumps(check, allow_nan=False)


def test_parameters_and_state_are_made_on_the_device_of_the_mesh():
    device = jax.devices()[3]
    with on(device) as mesh:
        place = replicated(mesh)
        shapes = {
            name: jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=place)
            for name in ("scale", "bias", "kernel")
        }
        made = random_leaves({"layer": shapes}, 0)["layer"]
    assert all(x.devices() == {device} and x.dtype == jnp.bfloat16 for x in made.values())
    np.testing.assert_array_equal(np.asarray(made["scale"], np.float32), 1.0)
    np.testing.assert_array_equal(np.asarray(made["bias"], np.float32), 0.0)
    assert np.asarray(made["kernel"], np.float32).std() == pytest.approx(0.02, rel=0.1)


def test_small_array_is_measured_against_all_of_them():
    errors = relative_errors({"a": 100.0, "b": 0.2}, {"a": 100.0, "b": 0.1})
    assert errors == pytest.approx({"a": 0.0, "b": 0.1}, rel=1e-4)
