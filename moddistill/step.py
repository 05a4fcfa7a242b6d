"""One optimizer step: gradients over micro-batches, clipping, update, metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moddistill.losses.tokens import Metrics
from moddistill.state import State

LossFn = Callable[..., tuple[jax.Array, Metrics]]


def make_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, accumulate: int, seed: int
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
    """`state, metrics = step(state, teacher, batch)`, a pure function of its arguments.

    Micro-batches count by the weight of their loss, so token means are those of the whole batch.
    Randomness is that of (seed, step).
    """

    def gradients(state: State, teacher: Any, batch: Any, rng: jax.Array) -> tuple[Any, Metrics]:
        """Gradient times the micro-batch's weight, and metrics."""
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, metrics = grad_fn(state.params, state.frozen, teacher, batch, rng)
        weight = metrics["loss"][1]
        return jax.tree.map(lambda g: g * weight, grads), metrics

    def step(state: State, teacher: Any, batch: Any) -> tuple[State, Metrics]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate == 1:
            grads, metrics = gradients(state, teacher, batch, rng)
        else:
            grads, metrics = _accumulate(gradients, accumulate, state, teacher, batch, rng)
        grads = jax.tree.map(lambda g: g / metrics["loss"][1], grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        one = jnp.ones((), jnp.float32)
        metrics["grad_norm"] = (optax.tree.norm(grads), one)
        metrics["tokens"] = (_real_tokens(batch), one)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def _accumulate(gradients, accumulate, state, teacher, batch, rng):
    """Sums gradients and metrics over `accumulate` micro-batches, in a scan."""
    micro = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

    def run(index: jax.Array, part: Any) -> tuple[Any, Metrics]:
        return gradients(state, teacher, part, jax.random.fold_in(rng, index))

    def body(total: Any, inputs: tuple[jax.Array, Any]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, run(*inputs)), None

    inputs = (jnp.arange(accumulate), micro)
    shapes = jax.eval_shape(run, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, inputs)[0]


def _real_tokens(batch: Any) -> jax.Array:
    """Positions that are not padding."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    segments = [x for path, x in leaves if path[-1].key == "segments"]
    return sum(jnp.sum(x > 0) for x in segments).astype(jnp.float32)
