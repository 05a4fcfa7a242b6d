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
from moddistill.training.program import make_program


@pytest.fixture(scope="module")
def report(tiny_config):
    """The plan of the smallest sparse stage on eight simulated devices."""
    config = tiny_config("d2s", mesh={"data": 2, "fsdp": 2, "expert": 2})
    return planner.plan(config, "cpu:8")


def test_what_a_plan_says(report):
    wanted = {"peak_bytes_per_chip", "argument_bytes_per_chip", "temp_bytes_per_chip"}
    wanted |= {"model_flops_per_step", "teacher_flops_per_step", "collectives", "fits"}
    assert report.keys() >= wanted
    assert report["chips"] == 8
    assert report["argument_bytes_per_chip"] >= sum(report["arguments"].values()) * 0.99
    assert report["collectives"]["all-reduce"]["bytes"] > 0
    assert report["peak_bytes_per_chip"] > report["temp_bytes_per_chip"] > 0
    assert (report["steps"], report["samples"]) == (4, 32)
    assert report["fits"] is None  # nobody knows this machine's other programs


def test_parameters_and_moments_are_split(tiny_config, report):
    """Moments are twice the trained parameters, and a share of each lies on every device."""
    alone = planner.plan(tiny_config("d2s", mesh={"data": 8}), "cpu:8")
    parts, whole = report["arguments"], alone["arguments"]
    assert whole["moments"] == pytest.approx(2 * whole["trained"], abs=16)
    assert parts["trained"] < 0.4 * whole["trained"]
    assert parts["teacher"] < whole["teacher"]


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5"


@pytest.mark.parametrize(
    ("fsdp", "expert", "tensor"), [(8, 1, 1), (2, 4, 1), (2, 2, 2), (64, 1, 1), (16, 4, 1)]
)
def test_a_chip_holds_its_share_of_parameters_and_moments(fsdp, expert, tensor):
    """Of the paper's sparse student and its teacher, to within 5 %, on 8 and on 64 chips."""
    config = from_config_dict(TrainConfig, d2s.get_config().to_dict())

    def held(*sizes):
        chips = [Chip(i) for i in range(math.prod(sizes))]
        mesh = Mesh(np.array(chips).reshape(1, *sizes), MESH_AXES)
        program = make_program(config, *planner.architectures(config), mesh)
        return planner.argument_bytes(program, {})

    whole, share = held(1, 1, 1), held(fsdp, expert, tensor)
    for part in ("trained", "moments", "frozen", "teacher"):
        ideal = whole[part] / (fsdp * expert * tensor)
        assert share[part] == pytest.approx(ideal, rel=0.05), part


def test_report_for_people(report):
    text = planner.describe(report)
    assert text.startswith("cpu:8: 8 chips, 8 samples at once\npeak ")
    assert "teacher" in text


def test_models_that_do_not_exist_stand_for_their_preset(tiny_config):
    config = dataclasses.replace(
        tiny_config("d2s"), student="runs/qwen2-0.5b/d2d/model", teacher="runs/qwen2-7b/sft/model"
    )
    student, teacher = planner.architectures(config)
    assert (student.decoder.width, student.decoder.moe.num_experts) == (896, 4)
    assert teacher.decoder.width == 3584
    with pytest.raises(ValueError, match="'runs/x/model' is not there and names no preset"):
        planner.architectures(dataclasses.replace(config, student="runs/x/model"))
    with pytest.raises(ValueError, match=r"names qwen2-0\.5b and qwen2-7b; accepted: a model"):
        planner.architectures(dataclasses.replace(config, student="qwen2-7b/qwen2-0.5b/model"))


@pytest.mark.parametrize(("fitting", "tried"), [(2, [1, 2]), (8, [1, 2, 4])])
def test_largest_micro_batch(tiny_config, monkeypatch, fitting, tried):
    """Of 32 samples on 8 devices, which take no fewer than 8 at once."""
    config = tiny_config("d2s", batch_size=32, mesh=dataclasses.asdict(MeshConfig()))
    seen = []

    def pretend(candidate, *_):
        seen.append(candidate.accumulate)
        return {"fits": candidate.accumulate >= fitting}

    monkeypatch.setattr(planner, "plan", pretend)
    monkeypatch.setattr(planner.accelerators, "topology_devices", lambda _: jax.devices())
    assert planner.fit(config, "v5e:2x4") == {"fits": fitting <= 4}
    assert seen == tried


def test_no_largest_micro_batch_where_memory_is_unknown(tiny_config):
    with pytest.raises(ValueError, match="how much memory 'cpu:8' has left"):
        planner.fit(tiny_config("d2s"), "cpu:8")


def test_a_described_gpu_has_no_host_memory(tiny_config, monkeypatch):
    monkeypatch.setattr(planner.accelerators, "topology_devices", lambda _: jax.devices())
    with pytest.raises(ValueError, match=r"teacher_memory is 'host'.*'h100:8'.*accepted: 'device'"):
        planner.plan(tiny_config("d2s", teacher_memory="host"), "h100:8")


def test_a_teacher_that_does_not_fit(tiny_config):
    config = dataclasses.replace(
        tiny_config("d2s"), student="random:qwen2-0.5b", teacher="random:tiny-teacher"
    )
    with pytest.raises(ValueError, match="image token of 'random:tiny-teacher': expected "):
        planner.architectures(config)


def test_a_tower_from_elsewhere_belongs_to_the_student(tiny_config):
    config = dataclasses.replace(
        tiny_config("init"), student="random:demo-language", vision="random:demo-teacher"
    )
    student, _ = planner.architectures(config)
    assert student.vision == PRESETS["demo-teacher"].vision
