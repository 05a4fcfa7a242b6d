import dataclasses

import jax
import pytest
from flax import linen as nn

from moddistill import sharding
from moddistill.config import MoeConfig
from moddistill.models.presets import preset
from moddistill.models.upcycle import upcycle_config
from moddistill.plan import abstract_batch
from moddistill.program import make_program, place


@pytest.fixture
def make(tiny_config):
    """`make(stage, **settings)`: the program of a stage, of a student that has its experts."""

    def run(stage, **settings):
        config = dataclasses.replace(tiny_config(stage), **settings)
        mesh = sharding.make_mesh(config.mesh)
        student = upcycle_config(preset("tiny"), MoeConfig(transport="ragged"))
        return config, mesh, make_program(config, student, preset("tiny-teacher"), mesh)

    return run


@pytest.mark.parametrize("donate", [True, False])
def test_a_step_takes_over_the_memory_of_its_state(make, donate):
    config, mesh, program = make("d2s", donate=donate)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
        state = place(program.state, program.places)
        batch = abstract_batch(config, program.model.config, mesh)
        text = program.step.lower(state, program.teacher, batch).as_text()
    assert ("tf.aliasing_output" in text or "jax.buffer_donor" in text) == donate


@pytest.mark.parametrize("stage", ["d2s", "preference"])
def test_rows_of_experts_travel_as_this_run_says_and_not_as_an_earlier_one(make, stage):
    _, _, program = make(stage, moe=MoeConfig(transport="all_to_all"))
    assert program.model.config.decoder.moe.transport == "all_to_all"
