import re

import jax
import pytest
from flax import linen as nn

from moddistill.config import ExpertConfig
from moddistill.distributed import sharding
from moddistill.models import attention_kernels
from moddistill.models.presets import preset
from moddistill.models.upcycle import upcycle_config
from moddistill.planning.planner import abstract_batch
from moddistill.training.program import make_program, with_shardings

LENGTH = 3 * 512


def quadratic_shapes(text):
    """Shapes in an HLO text with two dimensions of at least the length, or their product."""
    shapes = {tuple(map(int, x.split(","))) for x in re.findall(r"[a-z]\w*\[([\d,]+)\]", text)}
    return [x for x in shapes if sum(n >= LENGTH for n in x) > 1 or max(x) >= LENGTH**2]


@pytest.mark.slow
@pytest.mark.parametrize("block", [512, LENGTH])
def test_no_array_of_a_step_has_all_queries_and_all_keys(tiny_config, monkeypatch, block):
    """Unless all queries are one block, which shows that the search finds such arrays."""
    monkeypatch.setattr(attention_kernels, "_BLOCK", block)
    monkeypatch.setattr(attention_kernels, "_PARTS", 1 if block == LENGTH else 8)
    config = tiny_config("d2s", batch_size=1, data={"max_length": LENGTH})
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    student = upcycle_config(preset("tiny"), ExpertConfig())
    program = make_program(config, student, preset("tiny-teacher"), mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
        state = with_shardings(program.abstract_state, program.state_shardings)
        batch = abstract_batch(config, student, mesh)
        text = program.step.lower(state, program.teacher, batch).compile().as_text()
    assert bool(quadratic_shapes(text)) == (block == LENGTH)
