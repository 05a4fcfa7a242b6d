"""What the compiler for TPUs makes of the largest parts; `make tpu` installs it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.teacher_cache import write
from experiments import d2d, d2s
from moddistill import plan
from moddistill.config import ExpertConfig, MeshConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.distributed import accelerators
from moddistill.distributed.sharding import BATCH_AXES, RULES, make_mesh
from moddistill.models.attention_kernels import attend, causal
from moddistill.models.flops import step_flops
from moddistill.models.moe.expert_parallel import mix_experts
from moddistill.models.presets import preset
from moddistill.models.upcycle import upcycle_config
from moddistill.planning.answers import plan_answer
from moddistill.planning.content import step_content
from moddistill.planning.planner import abstract_batch, architectures
from moddistill.planning.roofline import answer_size
from moddistill.training.program import make_program, with_shardings

pytest.importorskip("libtpu", reason="needs the compiler for TPUs: make tpu")

EXPERTS, TOP_K, WIDTH, MLP = 4, 2, 896, 4864  # of Qwen2-0.5B


@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_an_expert_layer_takes_few_operations_beyond_those_of_its_active_experts(topology):
    """1,024 tokens, forward and backward: three products a row and kernel."""
    mesh = make_mesh(MeshConfig(), accelerators.topology_devices(topology))
    where = NamedSharding(mesh, PartitionSpec())

    def shape(*size, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(size, dtype, sharding=where)

    def loss(tokens, weights, experts, chosen, keep):
        output = mix_experts(tokens, weights, chosen, keep, experts)
        return jnp.sum(output.astype(jnp.float32) ** 2)

    tokens = 1024
    experts = {name: shape(EXPERTS, WIDTH, MLP) for name in ("gate", "up")}
    experts["down"] = shape(EXPERTS, MLP, WIDTH)
    inputs = (
        *(shape(tokens, WIDTH), shape(tokens, TOP_K, dtype=jnp.float32), experts),
        *(shape(tokens, TOP_K, dtype=dtype) for dtype in (jnp.int32, bool)),
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs).compile()
    ideal = 3 * 3 * 2 * tokens * TOP_K * WIDTH * MLP
    assert 1 <= compiled.cost_analysis()["flops"] / ideal <= 1.25


@pytest.mark.parametrize(
    ("topology", "mesh", "head_dim"),
    [("v5e:1x1", {}, 64), ("v5e:1x1", {}, 128), ("v6e:2x2", {"fsdp": 2, "tensor": 2}, 64)],
)
def test_attention_of_long_rows_is_one_kernel_on_each_chip(topology, mesh, head_dim):
    """4 rows of 2,048 positions, forward and backward, grouped heads."""
    mesh = make_mesh(MeshConfig(**mesh), accelerators.topology_devices(topology))

    def shape(*size, dtype=jnp.bfloat16):
        where = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        return jax.ShapeDtypeStruct((4, 2048, *size), dtype, sharding=where)

    def loss(query, key, value, segments):
        return jnp.sum(attend(query, key, value, causal(segments)).astype(jnp.float32) ** 2)

    query, key = shape(16, head_dim), shape(2, head_dim)
    inputs = query, key, key, shape(dtype=jnp.int32)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs).compile()
    assert "tpu_custom_call" in compiled.as_text()
    scores = 4 * 16 * 2048 * 2048 * 4  # bytes in float32, of all chips
    assert compiled.memory_analysis().temp_size_in_bytes < scores / mesh.size / 8


def test_a_step_uses_the_attention_kernel(tiny_config):
    mesh = {"fsdp": 2, "tensor": 2}
    config = tiny_config("d2s", batch_size=4, data={"max_length": 512}, mesh=mesh)
    mesh = make_mesh(config.mesh, accelerators.topology_devices("v6e:2x2"))
    student = upcycle_config(preset("tiny"), ExpertConfig())
    program = make_program(config, student, preset("tiny-teacher"), mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        state = with_shardings(program.abstract_state, program.state_shardings)
        lowered = program.step.lower(state, program.teacher, abstract_batch(config, student, mesh))
    assert "splash" in lowered.as_text(debug_info=True)
    assert "tpu_custom_call" in lowered.compile().as_text()


@pytest.mark.parametrize("topology", ["v4:2x2x1", "tpu7x:2x2x1"])
def test_a_step_is_planned_for_every_kind_of_chip(tiny_config, topology):
    config = tiny_config("d2s", batch_size=16, mesh={"fsdp": 2})
    report = plan.plan(config, topology)
    assert report["chips"] == 4
    assert report["fits"]
    assert report["collectives"]["all-gather"]["bytes"] > 0


def test_answers_of_a_sparse_model_are_planned_for_a_chip():
    config = upcycle_config(preset("tiny"), ExpertConfig())
    size = answer_size(config, rows=2, text_tokens=124, images=1, new_tokens=16)
    report = plan_answer(config, size, ["v5e"], "bfloat16", compiled=True)
    assert report["chips"]["v5e"]["fits"]
    assert report["chips"]["v5e"]["temp_bytes"] > 0


SMALL = "student=qwen2-0.5b,teacher=qwen2-7b"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "models", "trainable", "topology", "most"),
    [
        (d2s, SMALL, "paper", "v6e:1x1", 29),
        (d2s, None, "paper", "v5p:1x1x1", 60),
        (d2d, None, (".*",), "v5p:1x1x1", 80),
    ],
    ids=["0.5B from 7B", "1.8B from 7B", "1.8B from 7B, dense, all parameters"],
)
def test_distillation_of_the_papers_size_fits_one_chip(
    experiment, models, trainable, topology, most
):
    """GiB at the peak of a step of 8 samples of 2,048 positions, the teacher beside the student."""
    config = from_config_dict(TrainConfig, experiment.get_config(models).to_dict())
    report = plan.plan(dataclasses.replace(config, batch_size=8, trainable=trainable), topology)
    assert report["fits"]
    assert report["peak_bytes_per_chip"] <= most * 2**30


def test_distillation_from_a_cached_teacher_fits_a_small_chip(tmp_path):
    """64 ids of the 7B teacher; 8 samples of 2,048 positions. Most FLOPs are the live teacher's."""
    write(tmp_path, records=8, tokens=4, ids=64)
    live = from_config_dict(TrainConfig, d2s.get_config(SMALL).to_dict())
    live = dataclasses.replace(live, batch_size=8)
    config = dataclasses.replace(live, teacher=f"cache:{tmp_path}")
    report = plan.plan(config, "v5e:1x1")
    assert report["fits"] and report["teacher_flops_per_step"] == 0
    assert report["peak_bytes_per_chip"] <= 15 * 2**30
    models = architectures(live)
    size = step_content(live, *models).size
    teacher = step_flops(*models, size, trained=set(), shared_tower=True).teacher
    student = report["model_flops_per_step"]
    assert student <= 0.22 * (student + teacher)
