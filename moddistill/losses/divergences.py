"""Divergences and likelihoods of next-token distributions, as plain functions on logits.

With teacher p, student q and a share a, `mix`:

    forward_kl       KL(p || q)
    reverse_kl       KL(q || p)
    jsd              a KL(p || m) + (1 - a) KL(q || m),   m = a p + (1 - a) q
    skew_kl          KL(p || a p + (1 - a) q)
    skew_reverse_kl  KL(q || a q + (1 - a) p)
    total_variation  1/2 sum_v |p_v - q_v|

The forward KL is the paper's mimic loss. The reference code minimises the cross entropy to the
teacher, which is larger by the teacher's entropy and has the same gradient.

References:
  Generalised JSD: GKD, https://arxiv.org/abs/2306.13649.
  Skew KL: DistiLLM, https://arxiv.org/abs/2402.03898.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moddistill.config import DistillationConfig

Logits = Float[Array, "*T V"]


_FORWARD_KL = DistillationConfig()


def divergence(
    logits: Logits, teacher_logits: Logits, config: DistillationConfig = _FORWARD_KL
) -> Float[Array, "*T"]:
    """Returns the divergence of the config, by default the forward KL, in nats.

    With temperature t, it is that of logits / t, times t^2: the gradient of a divergence that is
    quadratic near its minimum falls with 1 / t^2.
    """
    scale = config.temperature
    student, teacher = (jax.nn.log_softmax(x / scale) for x in (logits, teacher_logits))
    return scale**2 * _divergence(student, teacher, config)


def _divergence(student: Logits, teacher: Logits, config: DistillationConfig) -> Array:
    mix = config.mix
    match config.divergence:
        case "forward_kl":
            return _kl(teacher, student)
        case "reverse_kl":
            return _kl(student, teacher)
        case "jsd":
            mixture = _mixture(teacher, student, mix)
            return mix * _kl(teacher, mixture) + (1 - mix) * _kl(student, mixture)
        case "skew_kl":
            return _kl(teacher, _mixture(teacher, student, mix))
        case "skew_reverse_kl":
            return _kl(student, _mixture(student, teacher, mix))
        case "total_variation":
            return jnp.sum(jnp.abs(jnp.exp(teacher) - jnp.exp(student)), axis=-1) / 2


def _kl(log_p: Logits, log_q: Logits) -> Float[Array, "*T"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v)."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _mixture(log_p: Logits, log_q: Logits, share: float) -> Logits:
    """log(share p + (1 - share) q)."""
    return jnp.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def cross_entropy(logits: Logits, labels: Int[Array, "*T"]) -> Float[Array, "*T"]:
    """-log q_label = logsumexp(logits) - logits[label], in nats."""
    # Labels of positions without a weight may be any id. They are clipped: a gather beyond the
    # vocabulary gives NaN, which a weight of 0 does not remove.
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
