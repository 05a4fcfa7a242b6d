"""One optimizer step: gradients over micro-batches, clipping, update, metrics."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moddistill.losses import Loss, Metrics
from moddistill.models.batch import AnyBatch, num_samples, sides_of
from moddistill.models.flops import size_of_batch
from moddistill.models.vlm import ModelConfig
from moddistill.training.state import State

_DECAY = 0.98  # of the running mean of the loss
_SMALL_LOSS = 0.1  # nats, below which a multiple of the mean is noise
_SMALL_NORM = 1.0  # of all parameters that are trained, which may begin as zeros


class Divergence(NamedTuple):
    """What a step does about a loss or norm that is not finite, or one that is too large.

    Attributes:
      factor: the largest loss as a multiple of its running mean (plus 0.1), and the largest norm of
        the parameters as a multiple of that before the step (plus 1); 0 for any.
      skips: whether such a step changes nothing.
    """

    factor: float = 0.0
    skips: bool = False


_ANY = Divergence()


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    seed: int,
    student: ModelConfig,
    divergence: Divergence = _ANY,
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
        new = state.replace(params=params, opt_state=opt_state)
        new, metrics = _without_divergence(state, new, metrics, divergence)
        metrics |= content_metrics(batch, student)
        return new.replace(step=state.step + 1), metrics

    return step


def _without_divergence(
    old: State, new: State, metrics: Metrics, divergence: Divergence
) -> tuple[State, Metrics]:
    """Updates the running mean of the loss, and finds a step that diverges from it.

    Such a step is counted in `metrics`. If it is skipped, the state stays as it was, and none of
    the other metrics counts it.
    """
    loss = jnp.divide(*metrics["loss"]).astype(jnp.float32)
    total = sum(metrics[name][0] for name in ("loss", "grad_norm", "param_norm"))
    diverges = ~jnp.isfinite(total)
    if divergence.factor:
        # A learning rate far too high can leave the loss at that of chance, and not above.
        norm = optax.tree.norm(old.params) + _SMALL_NORM
        diverges |= metrics["param_norm"][0] > divergence.factor * norm
        # Not before there is a mean, since no number is above NaN.
        diverges |= loss > divergence.factor * (old.mean_loss + _SMALL_LOSS)
    mean = jnp.where(jnp.isnan(old.mean_loss), loss, _DECAY * old.mean_loss + (1 - _DECAY) * loss)
    new = new.replace(mean_loss=jnp.where(diverges, old.mean_loss, mean))
    if divergence.skips:
        keep = functools.partial(jnp.where, diverges)
        new = jax.tree.map(keep, old, new)
        metrics = jax.tree.map(lambda x: keep(jnp.zeros_like(x), x), metrics)
    count = diverges.astype(jnp.float32)
    return new, metrics | {"diverged": (count, jnp.ones((), jnp.float32))}


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
    """Sums gradients and metrics over `accumulate` micro-batches, in a scan."""
    micro = micro_batches(batch, accumulate)

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


def micro_batches(rows: Any, count: int) -> Any:
    """Returns arrays [B, ...] as [A, B / A, ...], of `count` A parts.

    Each takes every A-th row, so that rows stay on the devices they are on.
    """
    # By way of [B / A, A, ...]: row i is in part i % A.
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), rows)
