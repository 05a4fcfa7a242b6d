"""Likelihoods of chunks of text that teacher and student divide into different tokens.

Of a chunk with probability p under the teacher and q under the student, the loss is the divergence
of "this chunk follows, or another text does", at most that of all texts:

    p log(p / q) + (1 - p) log((1 - p) / (1 - q))

References:
  ALM: https://arxiv.org/abs/2503.20083, with temperature 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moddistill.losses.chunked import LogitInputs
from moddistill.losses.likelihoods import policy_logprobs, sum_by_segment, surrogate
from moddistill.models.batch import LAST

# Nearer to 1, a float32 has too few digits of 1 - p.
_LARGEST = -1e-5


def chunk_divergence(
    student: Float[Array, "*N"], teacher: Float[Array, "*N"]
) -> Float[Array, "*N"]:
    """Returns the divergence of the log-likelihoods of chunks, in nats."""
    student, teacher = (jnp.minimum(x, _LARGEST) for x in (student, teacher))
    p = jnp.exp(teacher)
    follows = p * (teacher - student)
    return follows + (1 - p) * (_log_others(teacher) - _log_others(student))


def _log_others(logprobs: Array) -> Array:
    """log(1 - p) of log p."""
    return jnp.log(-jnp.expm1(logprobs))


def chunk_loss(
    token_sum: Callable,
    inputs: LogitInputs,
    chunk: Int[Array, "B T"],
    teacher_logprobs: Float[Array, "B T"],
    weight: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns `weight` times the sum of the divergences of all chunks, and that sum.

    Args:
      token_sum: `chunked_token_loss` with the labels of the batch.
      chunk: `WITHIN` at a token of a chunk, `LAST` at its last one, 0 elsewhere.
      teacher_logprobs: log-likelihood of a chunk under the teacher, at its last token.
      weight: of each chunk.
    """
    in_chunk, is_last = chunk > 0, chunk == LAST
    # A token's chunk is counted by the ends before it.
    ends = jnp.cumsum(is_last, axis=1) - is_last
    numbers = jnp.where(in_chunk, ends + 1, 0)
    weights = {"policy": in_chunk.reshape(-1).astype(jnp.float32)}
    _, values = token_sum(policy_logprobs, jax.lax.stop_gradient(inputs), weights=weights)
    policy = values["policy"].reshape(in_chunk.shape)
    teacher = sum_by_segment(teacher_logprobs * is_last, numbers)

    def loss_of(policy: Array) -> Array:
        # Of a number without a chunk, both log-likelihoods are 0, and so is their divergence.
        return jnp.sum(chunk_divergence(sum_by_segment(policy, numbers), teacher))

    total, d_policy = jax.value_and_grad(loss_of)(policy)
    return weight * total + surrogate(token_sum, inputs, in_chunk, weight * d_policy), total
