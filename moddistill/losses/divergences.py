"""Divergences and likelihoods of next-token distributions, as plain functions on logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def forward_kl(
    logits: Float[Array, "*T V"], teacher_logits: Float[Array, "*T V"]
) -> Float[Array, "*T"]:
    """KL(teacher || student) of next-token distributions, in nats (paper, equation of mimic loss).

    The reference minimises the cross entropy to the teacher: the same gradient, larger by the
    teacher's entropy.
    """
    teacher = jax.nn.log_softmax(teacher_logits)
    student = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def cross_entropy(logits: Float[Array, "*T V"], labels: Int[Array, "*T"]) -> Float[Array, "*T"]:
    """Negative log-likelihood of the labels, in nats."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
