"""What a run carries from step to step, and how parameters are made ready for it."""

from typing import Any

import flax
import jax.numpy as jnp
import optax

from moddistill.params import Flat, cast_frozen, flatten, split, unflatten


@flax.struct.dataclass
class State:
    """`params` train and have moments in `opt_state`; `frozen` ones have neither.

    Leaves are arrays, or in the same places their shapes or shardings.
    """

    step: Any
    params: Flat
    frozen: Flat
    opt_state: Any


def make_state(
    params: dict[str, Any], trainable: set[str], optimizer: optax.GradientTransformation, dtype: Any
) -> State:
    """The state before the first step: trained parameters in float32, frozen ones in `dtype`."""
    trained, frozen = split(params, trainable)
    trained = {path: x.astype(jnp.float32) for path, x in trained.items()}
    frozen = flatten(cast_frozen(unflatten(frozen), dtype))
    return State(jnp.zeros((), jnp.int32), trained, frozen, optimizer.init(trained))


def state_shardings(
    state: State, places: Flat, optimizer: optax.GradientTransformation, replicated: Any
) -> State:
    """Where a state's leaves lie: moments beside their parameters, counters everywhere.

    Args:
      state: the shapes of the state.
      places: shardings of all parameters by path.
    """
    trained = {path: places[path] for path in state.params}
    return State(
        step=replicated,
        params=trained,
        frozen={path: places[path] for path in state.frozen},
        opt_state=optax.tree.map_params(
            optimizer,
            lambda _, place: place,
            state.opt_state,
            trained,
            transform_non_params=lambda _: replicated,
        ),
    )
