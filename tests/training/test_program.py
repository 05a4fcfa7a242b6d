import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from moddistill.config import DataConfig, ExpertConfig, MeshConfig
from moddistill.distributed import sharding
from moddistill.distributed.sharding import make_mesh
from moddistill.errors import UserError
from moddistill.models.compute import ComputeConfig
from moddistill.models.presets import preset
from moddistill.models.upcycle import upcycle_config
from moddistill.planning.planner import abstract_batch
from moddistill.training.program import full_step_size, make_program, with_shardings


@pytest.fixture
def make(tiny_config):
    """`make(stage, **settings)`: the program of a stage, of a student that has its experts."""

    def run(stage, **settings):
        config = dataclasses.replace(tiny_config(stage), **settings)
        mesh = make_mesh(config.mesh)
        student = upcycle_config(preset("tiny"), ExpertConfig())
        return config, mesh, make_program(config, student, preset("tiny-teacher"), mesh)

    return run


@pytest.mark.parametrize("donate", [True, False])
def test_step_donates_its_state(make, donate):
    config, mesh, program = make("d2s", donate=donate)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
        state = with_shardings(program.abstract_state, program.state_shardings)
        batch = abstract_batch(config, program.model.config, mesh)
        text = program.step.lower(state, program.teacher, batch).as_text()
    assert ("tf.aliasing_output" in text or "jax.buffer_donor" in text) == donate


@pytest.mark.parametrize(("stage", "packing"), [("d2s", True), ("preference", False)])
def test_the_student_is_computed_by_the_settings_of_the_run(make, stage, packing):
    settings = {"expert_transport": "all_to_all", "remat": "matmuls", "scan": False}
    _, _, program = make(stage, data=DataConfig(packing=packing), **settings)
    assert program.model.compute == ComputeConfig(
        dtype=jnp.dtype("float32"),
        remat="matmuls",
        one_segment=not packing,
        unroll=True,
        expert_transport="all_to_all",
    )


@pytest.mark.parametrize(
    ("stage", "packing", "expected"),
    [
        # Images of 4 tokens in rows of 20: five of them, or two of a sample. A quarter is
        # supervised.
        ("d2s", True, (160, 3200, 8 * 5, 40)),
        ("d2s", False, (160, 3200, 8 * 2, 40)),
        ("preference", True, (320, 6400, 8 * 5, 80)),
    ],
)
def test_size_of_a_step_with_full_rows(tiny_config, stage, packing, expected):
    data = {"max_length": 20, "max_images": 2, "packing": packing}
    config = tiny_config(stage, batch_size=8, data=data)
    assert full_step_size(config, preset("tiny")) == expected
    text = dataclasses.replace(preset("tiny"), vision=None)
    # Of a teacher that reads an image as 9 tokens, a row has place for two, of 18 tokens.
    vision = dataclasses.replace(preset("tiny").vision, image_size=42)
    teacher = dataclasses.replace(preset("tiny"), vision=vision)
    rows = expected[0] // 20
    images = 8 * 2
    tokens = expected[0] - rows // 8 * images * 5
    own = full_step_size(config, preset("tiny"), teacher)
    assert own == (tokens, tokens**2 / rows, images, round(tokens / 4))
    assert full_step_size(config, text).images == 0


@pytest.mark.parametrize(
    ("mesh", "sizes", "message"),
    [
        (
            {"tensor": 4},
            {},
            r"mesh\.tensor: .* divisor of 2, the kv_heads of the student's .*/key/.* got 4",
        ),
        (
            {"tensor": 2},
            {"intermediate_size": 33},
            r"mesh\.tensor: expected a divisor of 33, the mlp of .* got 2",
        ),
        (
            {"expert": 8},
            {"moe": ExpertConfig()},
            r"mesh\.expert: .* of 4, the expert of .*/experts_.* got 8",
        ),
        (
            {"fsdp": 4, "expert": 2},
            {"hidden_size": 20},
            r"mesh\.fsdp \* config\.mesh\.expert: .* divisor of 20, the embed of .* got 8",
        ),
    ],
)
def test_mesh_that_does_not_divide_the_student_is_refused(
    tiny_config, tiny_architecture, mesh, sizes, message
):
    student = tiny_architecture()
    student = dataclasses.replace(student, decoder=dataclasses.replace(student.decoder, **sizes))
    with pytest.raises(ValueError, match=message):
        make_program(tiny_config("sft"), student, None, make_mesh(MeshConfig(**mesh)))


def test_mesh_that_does_not_divide_the_teacher_is_refused(tiny_config, tiny_architecture):
    student, teacher = tiny_architecture("demo-teacher"), tiny_architecture()
    mesh = make_mesh(MeshConfig(tensor=4))
    with pytest.raises(
        ValueError, match=r"mesh\.tensor: .* divisor of 2, the kv_heads of the teacher's .* got 4"
    ):
        make_program(tiny_config("d2d"), student, teacher, mesh)


def test_ragged_transport_between_cpus_is_refused(tiny_config, tiny_architecture):
    config = tiny_config("sft", expert_transport="ragged")
    student = tiny_architecture("tiny", ExpertConfig())
    make_program(config, student, None, make_mesh(MeshConfig(), jax.devices()[:1]))
    message = (
        r"^config\.expert_transport: expected 'all_gather' or 'all_to_all' on 8 CPUs, .* student "
        r"has experts, got 'ragged'$"
    )
    with pytest.raises(UserError, match=message):
        make_program(config, student, None, make_mesh(MeshConfig()))
