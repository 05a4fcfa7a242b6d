"""Losses of the likelihood of several tokens together, by chunks of positions.

A chunk of positions sees some tokens of a text, while a loss L of its log-likelihood needs the sum
over all of them. So there are two passes: one computes the log-probabilities of tokens without
gradient, and `surrogate` adds the gradient of L, which is known then.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moddistill.losses.chunked import LogitInputs
from moddistill.losses.divergences import cross_entropy
from moddistill.teachers.targets import Targets


def sum_by_segment(
    values: Float[Array, "B T"] | Bool[Array, "B T"], segments: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Returns the sum over segment s + 1 of each row in column s; 0 for segments that it lacks.

    A row of T tokens has at most T segments, so the result has that static width.
    """
    size = segments.shape[1] + 1
    sums = functools.partial(jax.ops.segment_sum, num_segments=size)
    return jax.vmap(sums)(values.astype(jnp.float32), segments)[:, 1:]  # 0 is padding


def policy_logprobs(logits: Array, _: Targets, labels: Array) -> dict[str, Array]:
    """A token function: the student's log-probabilities of labels, `policy`."""
    return {"policy": -cross_entropy(logits, labels)}


def surrogate(
    token_sum: Callable,
    inputs: LogitInputs,
    supervised: Bool[Array, "B T"],
    d_policy: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Returns 0, with the gradient of a loss L of log-likelihoods pi_i = sum_t log p_it.

    By the chain rule

        d L / d theta = sum_i (d L / d pi_i) sum_t d log p_it / d theta,

    which is the gradient of sum_it c_i log p_it with constants c_i = d L / d pi_i: a token loss
    with weights c_i, which `d_policy` has at every position of text i. Its value means nothing
    and is subtracted; x - x is 0 to the last bit, however large x is.
    """
    weights = {"policy": (supervised * d_policy).reshape(-1)}
    value, _ = token_sum(policy_logprobs, inputs, weights=weights)
    return value - jax.lax.stop_gradient(value)
