"""One optimizer step: gradients over micro-batches, clipping, update, metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moddistill.losses import Loss, Metrics
from moddistill.models.batch import AnyBatch, num_samples, sides_of
from moddistill.models.flops import size_of_batch
from moddistill.models.vlm import ModelConfig
from moddistill.training.state import State


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    seed: int,
    student: ModelConfig,
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
    """Returns `state, metrics = step(state, teacher, batch)`, a pure function.

    Its randomness is `fold_in(seed, step)`, so that a resumed run repeats it.
    """

    def step(state: State, teacher: Any, batch: Any) -> tuple[State, Metrics]:
        # Denominators are of the entire batch: each micro-batch's loss is its share of the mean,
        # and gradients of micro-batches add up to that of the batch, whatever their tokens.
        denominators = loss.denominators(batch)

        def gradients(part: Any, rng: jax.Array) -> tuple[Any, Metrics]:
            gradient = jax.grad(loss.micro_batch, has_aux=True)
            return gradient(state.params, state.frozen, teacher, part, denominators, rng)

        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate == 1:
            grads, metrics = gradients(batch, rng)
        else:
            grads, metrics = _accumulate(gradients, accumulate, batch, rng)
        # The optimizer clips the sum over micro-batches; `grad_norm` is that before clipping.
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        one = jnp.ones((), jnp.float32)
        metrics["grad_norm"] = (optax.tree.norm(grads), one)
        metrics["param_norm"] = (optax.tree.norm(params), one)  # not finite if any of them is not
        metrics |= content_metrics(batch, student)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def content_metrics(batch: AnyBatch, student: ModelConfig) -> Metrics:
    """Returns the content of a step: `StepSize` by its names, samples, and share of padding.

    `supervised` has the weight of tokens and `padding` that of positions, so that their means are
    shares; the others are numbers of a step.
    """
    size, one = size_of_batch(batch, student), jnp.ones((), jnp.float32)
    positions = jnp.asarray(sum(side.tokens.size for side in sides_of(batch)), jnp.float32)
    metrics = {name: (value, one) for name, value in size._asdict().items()}
    metrics["supervised"] = (size.supervised, size.tokens)
    metrics["padding"] = (positions - size.tokens, positions)
    metrics["samples"] = (num_samples(batch), one)
    return metrics


def _accumulate(
    gradients: Callable[..., tuple[Any, Metrics]], accumulate: int, batch: Any, rng: jax.Array
) -> tuple[Any, Metrics]:
    """Sums gradients and metrics over `accumulate` micro-batches, in a scan.

    Each takes every `accumulate`-th row, so that rows stay on the devices they are on.
    """
    # [B, ...] to [B / A, A, ...] to [A, B / A, ...]: row i is in micro-batch i % A.
    micro = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def run(index: jax.Array, part: Any) -> tuple[Any, Metrics]:
        return gradients(part, jax.random.fold_in(rng, index))

    def body(total: Any, inputs: tuple[jax.Array, Any]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, run(*inputs)), None

    # Metrics are (sum, weight) pairs, which add up like gradients; the host divides them. The carry
    # needs the structure of both before the first micro-batch has run, hence `eval_shape`.
    inputs = (jnp.arange(accumulate), micro)
    shapes = jax.eval_shape(run, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(body, zeros, inputs)[0]
