import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments import d2s
from moddistill.config import MeshConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.distributed.sharding import MESH_AXES
from moddistill.models.presets import PRESETS
from moddistill.planning import planner
from moddistill.storage.model_folder import save_model
from moddistill.training.program import make_program


@pytest.fixture(scope="module")
def report(tiny_config):
    """Returns the plan of the smallest sparse stage on eight simulated devices."""
    config = tiny_config("d2s", mesh={"data": 2, "fsdp": 2, "expert": 2})
    return planner.plan(config, "cpu:8")


def test_plan_reports_memory_flops_and_collectives(report):
    keys = {"peak_bytes_per_chip", "argument_bytes_per_chip", "temp_bytes_per_chip"}
    keys |= {"model_flops_per_step", "teacher_flops_per_step", "collectives", "fits"}
    assert report.keys() >= keys
    assert report["chips"] == 8
    assert report["argument_bytes_per_chip"] >= sum(report["arguments"].values()) * 0.99
    assert report["collectives"]["all-reduce"]["bytes"] > 0
    assert report["peak_bytes_per_chip"] > report["temp_bytes_per_chip"] > 0
    assert (report["steps"], report["batch_size"]) == (4, 8)
    assert report["fits"] is None  # other programs use memory of this machine


@pytest.mark.slow
def test_logits_at_image_positions_are_planned(tiny_config, report):
    config = tiny_config(
        "d2s",
        mesh={"data": 2, "fsdp": 2, "expert": 2},
        distillation={"image_kd_weight": 1.0, "relation_weight": 0.5},
    )
    found = planner.plan(config, "cpu:8")
    for name in ("model_flops_per_step", "teacher_flops_per_step", "temp_bytes_per_chip"):
        assert found[name] > report[name]


@pytest.mark.slow
def test_parameters_and_moments_are_sharded(tiny_config, report):
    """Moments have twice the bytes of the trained parameters."""
    data_parallel = planner.plan(tiny_config("d2s", mesh={"data": 8}), "cpu:8")
    sharded, replicated = report["arguments"], data_parallel["arguments"]
    assert replicated["moments"] == pytest.approx(2 * replicated["trained"], abs=16)
    assert sharded["trained"] < 0.4 * replicated["trained"]
    assert sharded["teacher"] < replicated["teacher"]


@dataclasses.dataclass(frozen=True)
class FakeChip:
    id: int
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


@pytest.mark.parametrize(
    ("fsdp", "expert", "tensor"), [(8, 1, 1), (2, 4, 1), (2, 2, 2), (64, 1, 1), (16, 4, 1)]
)
def test_bytes_per_chip_fall_with_the_number_of_chips(fsdp, expert, tensor):
    """The paper's sparse student and its teacher, to within 5 %, on 8 and on 64 chips."""
    config = from_config_dict(TrainConfig, d2s.get_config().to_dict())

    def bytes_on_mesh(*sizes):
        chips = [FakeChip(i) for i in range(math.prod(sizes))]
        mesh = Mesh(np.array(chips).reshape(1, *sizes), MESH_AXES)
        program = make_program(config, *planner.architectures(config), mesh)
        return planner.argument_bytes(program, {})

    total, share = bytes_on_mesh(1, 1, 1), bytes_on_mesh(fsdp, expert, tensor)
    for part in ("trained", "moments", "frozen", "teacher"):
        ideal = total[part] / (fsdp * expert * tensor)
        assert share[part] == pytest.approx(ideal, rel=0.05), part


def test_report_is_formatted_as_text(report):
    text = planner.format_report(report)
    assert text.startswith("cpu:8: 8 chips, 8 rows at once\npeak ")
    assert "teacher" in text


def test_missing_models_are_planned_as_the_preset_in_their_path(tiny_config):
    config = dataclasses.replace(
        tiny_config("d2s"), student="runs/qwen2-0.5b/d2d/model", teacher="runs/qwen2-7b/sft/model"
    )
    student, teacher = planner.architectures(config)
    assert (student.decoder.hidden_size, student.decoder.moe.num_experts) == (896, 4)
    assert teacher.decoder.hidden_size == 3584
    with pytest.raises(
        ValueError,
        match=r"^model: expected .* folder, .*, got 'runs/x/model' with none",
    ):
        planner.architectures(dataclasses.replace(config, student="runs/x/model"))
    with pytest.raises(ValueError, match=r"got .* with qwen2-0\.5b and qwen2-7b$"):
        planner.architectures(dataclasses.replace(config, student="qwen2-7b/qwen2-0.5b/model"))


@pytest.mark.parametrize(("fits_from", "expected"), [(2, [1, 2]), (8, [1, 2, 4])])
def test_fit_plans_the_largest_micro_batch_that_fits(tiny_config, monkeypatch, fits_from, expected):
    """32 samples on 8 devices, at least one sample per device."""
    config = tiny_config("d2s", batch_size=32, mesh=dataclasses.asdict(MeshConfig()))
    tried = []

    def fake_plan(candidate, *_):
        tried.append(candidate.grad_accum_steps)
        return {"fits": candidate.grad_accum_steps >= fits_from}

    monkeypatch.setattr(planner, "plan", fake_plan)
    monkeypatch.setattr(planner.accelerators, "topology_devices", lambda _: jax.devices())
    assert planner.fit(config, "v5e:2x4") == {"fits": fits_from <= 4}
    assert tried == expected


def test_fit_on_a_topology_of_unknown_memory_is_an_error(tiny_config):
    with pytest.raises(ValueError, match=r"topology: expected one of .* with --fit.*got 'cpu:8'"):
        planner.fit(tiny_config("d2s"), "cpu:8")


def test_teacher_in_host_memory_of_a_planned_gpu_is_an_error(tiny_config, monkeypatch):
    monkeypatch.setattr(planner.accelerators, "topology_devices", lambda _: jax.devices())
    with pytest.raises(ValueError, match=r"_offload: expected False for 'h100:8'.* got True"):
        planner.plan(tiny_config("d2s", teacher_offload=True), "h100:8")


@pytest.mark.slow
def test_a_teacher_of_another_layout_is_planned(
    tiny_config, init, tiny_architecture, tokenizer, tmp_path
):
    """With 16 patches an image in place of 4, and another template."""
    model = tiny_architecture("tiny-teacher")
    vision = dataclasses.replace(model.vision, patch_size=7)
    other = dataclasses.replace(model, vision=vision, template="chatml")
    models = {"student": tiny_architecture(), "same": model, "other": other}
    for name, config in models.items():
        save_model(tmp_path / name, config, init(config), tokenizer, {})
    student = {"student": str(tmp_path / "student"), "tokenizer": ""}
    same, own = (
        planner.plan(tiny_config("d2s", teacher=str(tmp_path / name), **student), "cpu:8")
        for name in ("same", "other")
    )
    assert own["model_flops_per_step"] == same["model_flops_per_step"]
    assert own["teacher_flops_per_step"] > 1.03 * same["teacher_flops_per_step"]
    with pytest.raises(ValueError, match=r"relation_weight: expected 0.0, since the teacher "):
        planner.plan(
            tiny_config(
                "d2s",
                teacher=str(tmp_path / "other"),
                distillation={"relation_weight": 1.0},
                **student,
            ),
            "cpu:8",
        )
    # Of each of the 200 positions of a chip, 5 numbers of 4 bytes and 3 of one byte.
    assert own["arguments"]["batch"] - same["arguments"]["batch"] == 200 * (5 * 4 + 3)


def test_vision_encoder_of_another_model_is_part_of_the_student(tiny_config):
    config = dataclasses.replace(
        tiny_config("init"), student="random:demo-language", vision="random:demo-teacher"
    )
    student, _ = planner.architectures(config)
    assert student.vision == PRESETS["demo-teacher"].vision
