import jax
import jax.numpy as jnp
import pytest

from moddistill.config import ExpertConfig, OptimConfig
from moddistill.params import cast_frozen, flatten, match
from moddistill.training.optim import make_optimizer
from moddistill.training.state import make_state


@pytest.fixture(scope="module")
def params(tiny_architecture, init):
    return init(tiny_architecture("tiny", ExpertConfig(residual=True)))


@pytest.fixture(scope="module")
def state(params):
    trainable = match(list(flatten(params)), ["projector/.*", ".*/router"], "here")
    return make_state(params, trainable, make_optimizer(OptimConfig(), 10), jnp.bfloat16)


def test_trainable_and_frozen_parameters_partition_the_model(state, params):
    assert state.step == 0
    assert {path.split("/")[0] for path in state.params} == {"projector", "decoder"}
    assert not state.params.keys() & state.frozen.keys()
    assert state.params.keys() | state.frozen.keys() == flatten(params).keys()


def test_trained_parameters_are_float32(params):
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    optimizer = make_optimizer(OptimConfig(), 10)
    state = make_state(halved, set(flatten(params)), optimizer, jnp.bfloat16)
    assert {x.dtype for x in state.params.values()} == {jnp.dtype("float32")}


def test_frozen_parameters_have_no_moments(state):
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * sum(x.size for x in state.params.values())


def test_frozen_routers_and_norms_stay_float32(params):
    wide = {
        path.split("/")[-1]
        for path, x in flatten(cast_frozen(params, jnp.bfloat16)).items()
        if x.dtype == jnp.float32
    }
    assert wide == {"router", "scale", "blend", "blend_bias"}
