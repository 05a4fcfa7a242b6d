"""Training state: trainable and frozen parameters, optimizer state, step."""

from typing import Any

import flax
import jax.numpy as jnp
import optax

from moddistill.params import Flat, cast_frozen, flatten, split, unflatten


@flax.struct.dataclass
class State:
    """Training state.

    Leaves are arrays, `ShapeDtypeStruct`s (an abstract state) or shardings.

    Attributes:
      step: number of completed steps, int32.
      params: trainable parameters by path, float32.
      frozen: all other parameters by path; they have no moments.
      opt_state: moments of `params`, and counters.
      mean_loss: running mean of the loss, float32; NaN before the first step.
    """

    step: Any
    params: Flat
    frozen: Flat
    opt_state: Any
    mean_loss: Any


def make_state(
    params: dict[str, Any], trainable: set[str], optimizer: optax.GradientTransformation, dtype: Any
) -> State:
    """The state before the first step: trained parameters in float32, frozen ones in `dtype`."""
    trained, frozen = split(params, trainable)
    # bfloat16 has 8 significant bits: an update below 2^-9 of a weight would round to no change.
    trained = {path: x.astype(jnp.float32) for path, x in trained.items()}
    frozen = flatten(cast_frozen(unflatten(frozen), dtype))
    moments = optimizer.init(trained)
    return State(jnp.zeros((), jnp.int32), trained, frozen, moments, jnp.float32(jnp.nan))


def make_state_shardings(
    state: State, param_shardings: Flat, optimizer: optax.GradientTransformation, replicated: Any
) -> State:
    """Shardings of a state: moments like their parameters, counters replicated.

    Args:
      state: the shapes of the state.
      param_shardings: of all parameters by path.
    """
    trained = {path: param_shardings[path] for path in state.params}
    return State(
        step=replicated,
        params=trained,
        frozen={path: param_shardings[path] for path in state.frozen},
        # `map_params` finds the subtrees with the structure of `params` (the moments); all other
        # leaves are counters.
        opt_state=optax.tree.map_params(
            optimizer,
            lambda _, sharding: sharding,
            state.opt_state,
            trained,
            transform_non_params=lambda _: replicated,
        ),
        mean_loss=replicated,
    )
