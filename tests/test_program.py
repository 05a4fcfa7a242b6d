import dataclasses

import jax
import pytest

from moddistill.config import MeshConfig, MoeConfig
from moddistill.program import make_program
from moddistill.sharding import make_mesh


@pytest.mark.parametrize(
    ("mesh", "sizes", "message"),
    [
        ({"tensor": 4}, {}, r"mesh\.tensor is 4, .* student's .*/key/.* has 2 kv_heads; accepted"),
        ({"tensor": 2}, {"mlp": 33}, r"mesh\.tensor is 2, .* has 33 mlp; accepted: a divisor of 3"),
        ({"expert": 8}, {"moe": MoeConfig()}, r"mesh\.expert is 8, .*/experts_.* has 4 expert;"),
        ({"fsdp": 4, "expert": 2}, {"width": 20}, r"fsdp \* mesh\.expert is 8, .* has 20 embed;"),
    ],
)
def test_mesh_that_cannot_cut_the_student(tiny_config, tiny_architecture, mesh, sizes, message):
    student = tiny_architecture()
    student = dataclasses.replace(student, decoder=dataclasses.replace(student.decoder, **sizes))
    with pytest.raises(ValueError, match=message):
        make_program(tiny_config("sft"), student, None, make_mesh(MeshConfig(**mesh)))


def test_mesh_that_cannot_cut_the_teacher(tiny_config, tiny_architecture):
    student, teacher = tiny_architecture("demo-teacher"), tiny_architecture()
    mesh = make_mesh(MeshConfig(tensor=4))
    with pytest.raises(ValueError, match=r"mesh\.tensor is 4, .* the teacher's .* has 2 kv_heads"):
        make_program(tiny_config("d2d"), student, teacher, mesh)


def test_ragged_transport_between_cpus(tiny_config, tiny_architecture):
    config, student = tiny_config("sft"), tiny_architecture("tiny", MoeConfig(transport="ragged"))
    make_program(config, student, None, make_mesh(MeshConfig(), jax.devices()[:1]))
    with pytest.raises(ValueError, match=r"moe\.transport of the student is 'ragged'.*: ring, all"):
        make_program(config, student, None, make_mesh(MeshConfig()))
