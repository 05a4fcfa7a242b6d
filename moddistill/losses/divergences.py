"""Divergences and likelihoods of next-token distributions, as plain functions on logits.

With teacher p, student q and a share a, `mix`:

    forward_kl       KL(p || q)
    reverse_kl       KL(q || p)
    jsd              a KL(p || m) + (1 - a) KL(q || m),   m = a p + (1 - a) q
    skew_kl          KL(p || a p + (1 - a) q)
    skew_reverse_kl  KL(q || a q + (1 - a) p)
    total_variation  1/2 sum_v |p_v - q_v|
    uld              sum_i |p_(i) - q_(i)|, the i-th largest probabilities

The forward KL is the paper's mimic loss. The reference code minimises the cross entropy to the
teacher, which is larger by the teacher's entropy and has the same gradient.

Of a teacher whose K most probable ids are known, all other ids are one bucket of both models: the
divergence of the K + 1 probabilities is never above that of all ids, and equal at K = V. Without
the bucket, nothing would keep the student from the other ids. `uld` compares the K largest
probabilities of each model, whatever their ids are, so that vocabularies need not have any in
common.

Of a teacher with n ids drawn from p, the mean over them is an unbiased estimate of a divergence
that is an expectation under p.

References:
  Sampled ids: https://arxiv.org/abs/2503.16870.
  Generalised JSD: GKD, https://arxiv.org/abs/2306.13649.
  Skew KL: DistiLLM, https://arxiv.org/abs/2402.03898.
  ULD: https://arxiv.org/abs/2402.12030.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moddistill.config import DistillationConfig, Divergence
from moddistill.models.logits import MASKED
from moddistill.teachers.targets import (
    NO_ID,
    FullLogits,
    LabelLogprobs,
    Predictions,
    Samples,
    TopK,
)

# Those that are expectations under the teacher, which ids drawn from it estimate.
SAMPLED_DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "skew_kl")
Logits = Float[Array, "*T V"]


_FORWARD_KL = DistillationConfig()


def divergence(
    logits: Logits, teacher_logits: Logits, config: DistillationConfig = _FORWARD_KL
) -> Float[Array, "*T"]:
    """Returns the divergence of the config, by default the forward KL, in nats.

    With temperature t, it is that of logits / t, times t^2: the gradient of a divergence that is
    quadratic near its minimum falls with 1 / t^2. Those of `total_variation` and `uld` are not;
    their gradients fall with 1 / t and grow with t here.
    """
    scale = config.temperature
    student, teacher = (jax.nn.log_softmax(x / scale) for x in (logits, teacher_logits))
    return scale**2 * _divergence(student, teacher, config)


def divergence_to(
    teacher: Predictions, logits: Float[Array, "C V"], config: DistillationConfig
) -> Float[Array, "C"]:
    """Returns the divergence of the config from whatever is known of the teacher, in nats.

    What comes from a cache was divided by the temperature when it was made.
    """
    match teacher:
        case FullLogits(teacher_logits):
            # Embeddings are padded to different sizes; rows after the smaller one are masked.
            size = min(logits.shape[1], teacher_logits.shape[1])
            return divergence(logits[:, :size], teacher_logits[:, :size], config)
        case TopK():
            return _to_top_k(teacher, logits, config)
        case Samples():
            return _to_samples(teacher, logits, config)


def _to_top_k(teacher: TopK, logits: Array, config: DistillationConfig) -> Array:
    student = jax.nn.log_softmax(logits / config.temperature)
    if config.divergence == "uld":
        return config.temperature**2 * _uld_to_top_k(teacher, student)
    if teacher.classes is not None:
        student = _of_classes(student, teacher.classes)
    chosen = _logprobs_of(teacher.ids, student)
    # Over the other ids only: 1 - sum_k q_k has no correct digit where the sum is nearly 1.
    others = jnp.put_along_axis(student, teacher.ids, MASKED, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    known = jnp.concatenate([teacher.logprobs, teacher.log_rest[:, None]], axis=-1)
    # Log-probabilities of a cache are rounded, and would not add up to one.
    return config.temperature**2 * _divergence(
        jnp.concatenate([chosen, rest], axis=-1), jax.nn.log_softmax(known), config
    )


def _of_classes(log_q: Float[Array, "C V"], classes: Int[Array, "N"]) -> Float[Array, "C V"]:
    """Log-probabilities of classes at the ids that stand for them; masked at all other ids."""
    size = log_q.shape[1]
    classes = jnp.concatenate([classes[:size], jnp.arange(len(classes), size)])
    sums = jnp.zeros_like(log_q).at[:, classes].add(jnp.exp(log_q))
    # Two steps, since the gradient of log at 0 is no number, even where another value is chosen.
    return jnp.where(sums > 0, jnp.log(jnp.where(sums > 0, sums, 1.0)), MASKED)


def _uld_to_top_k(teacher: TopK, log_q: Logits) -> Array:
    """The difference of the largest probabilities, and of the sums of all smaller ones.

    It is at most that of all probabilities, since |sum (p - q)| <= sum |p - q|.
    """
    known = jnp.concatenate([teacher.logprobs, teacher.log_rest[:, None]], axis=-1)
    known = jax.nn.softmax(known)
    p, rest = -jnp.sort(-known[:, :-1]), known[:, -1]
    count = min(p.shape[1], log_q.shape[1])  # of a larger vocabulary
    q = jnp.exp(jax.lax.top_k(log_q, count)[0])
    rest_q = 1 - jnp.sum(q, axis=-1)
    q = jnp.pad(q, ((0, 0), (0, p.shape[1] - count)))
    return jnp.sum(jnp.abs(p - q), axis=-1) + jnp.abs(rest - rest_q)


def _to_samples(teacher: Samples, logits: Array, config: DistillationConfig) -> Array:
    student = jax.nn.log_softmax(logits / config.temperature)
    student = _logprobs_of(teacher.ids, student)
    if config.divergence == "skew_kl":
        student = _mixture(teacher.logprobs, student, config.mix)
    drawn = teacher.ids != NO_ID
    total = jnp.sum(jnp.where(drawn, teacher.logprobs - student, 0.0), axis=-1)
    return config.temperature**2 * total / jnp.maximum(jnp.sum(drawn, axis=-1), 1)


def _logprobs_of(ids: Int[Array, "C K"], log_q: Float[Array, "C V"]) -> Float[Array, "C K"]:
    """The log-probabilities of ids; masked of an id beyond the vocabulary."""
    return jnp.take_along_axis(log_q, ids, axis=-1, mode="fill", fill_value=MASKED)


def label_logprobs(teacher: Predictions, labels: Int[Array, "C"]) -> Float[Array, "C"]:
    """Returns the teacher's log-probabilities of labels, or what sums to them over an answer."""
    match teacher:
        case FullLogits(logits):
            return -cross_entropy(logits, labels)
        case LabelLogprobs(logprobs):
            return logprobs


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
        case "uld":
            p, q = (jnp.sort(jnp.exp(x), axis=-1) for x in (teacher, student))
            return jnp.sum(jnp.abs(p - q), axis=-1)


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
