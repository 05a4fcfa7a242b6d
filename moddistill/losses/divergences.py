"""Divergences and likelihoods of next-token distributions, as plain functions on logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def forward_kl(
    logits: Float[Array, "*T V"], teacher_logits: Float[Array, "*T V"]
) -> Float[Array, "*T"]:
    """KL(teacher || student) = sum_v p_v (log p_v - log q_v) of next-token distributions, in nats.

    The paper's mimic loss. The reference code minimises the cross entropy to the teacher, which is
    larger by the teacher's entropy and has the same gradient.
    """
    teacher = jax.nn.log_softmax(teacher_logits)
    student = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def cross_entropy(logits: Float[Array, "*T V"], labels: Int[Array, "*T"]) -> Float[Array, "*T"]:
    """-log q_label = logsumexp(logits) - logits[label], in nats."""
    # Labels of positions without a weight may be any id. They are clipped: a gather beyond the
    # vocabulary gives NaN, which a weight of 0 does not remove.
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
