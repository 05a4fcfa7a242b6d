"""Forward KL to the teacher and cross entropy, at supervised positions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moddistill.config import LossConfig
from moddistill.losses.router import balance_loss, z_loss
from moddistill.losses.tokens import Heads, Metrics, next_token, rows, weighted_sum
from moddistill.models.vlm import Output, Vlm
from moddistill.tree import merge


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


def token_loss(
    student: Vlm, teacher: Vlm | None, config: LossConfig, terms: tuple[str, ...]
) -> Callable[..., tuple[Array, Metrics]]:
    """The loss of the token stages: `terms` (of `kd` and `ce`), weighted, and router losses."""
    coefficient = {"kd": config.kd_weight, "ce": config.ce_weight}

    def token_fn(logits: Array, teacher_logits: Array | None, labels: Array) -> dict[str, Array]:
        values = {"ce": cross_entropy(logits, labels)} if "ce" in terms else {}
        return values | ({"kd": forward_kl(logits, teacher_logits)} if "kd" in terms else {})

    def loss(
        params: dict, frozen: dict, teacher_params: dict | None, batch: dict, rng: Array
    ) -> tuple[Array, Metrics]:
        output = student.apply({"params": merge(params, frozen)}, batch)
        labels, supervised = next_token(batch["tokens"], batch["loss_mask"])
        heads = Heads(rows(output.hidden), output.head)
        real_vocab = student.config.decoder.real_vocab
        if "kd" in terms:
            target = jax.lax.stop_gradient(teacher.apply({"params": teacher_params}, batch))
            heads = Heads(*heads[:2], rows(target.hidden), target.head)
            real_vocab = min(real_vocab, teacher.config.decoder.real_vocab)
        masks = {"ce": supervised, "kd": kd_positions(batch, supervised, config)}
        weights = {name: masks[name].reshape(-1).astype(jnp.float32) for name in terms}
        counts = {name: jnp.maximum(jnp.sum(weight), 1.0) for name, weight in weights.items()}
        total, values = weighted_sum(
            token_fn,
            heads,
            labels.reshape(-1),
            {name: weight * (coefficient[name] / counts[name]) for name, weight in weights.items()},
            chunk=config.chunk,
            real_vocab=real_vocab,
        )
        weight = counts[terms[0]]
        metrics = {name: (jnp.sum(values[name] * weights[name]), counts[name]) for name in terms}
        return add_router_losses(total, metrics, output, config, weight)

    return loss


def kd_positions(batch: dict[str, Any], supervised: Array, config: LossConfig) -> Array:
    """Positions whose prediction is distilled: those of the answers, or of all real tokens.

    `kd_shift="reference"` keeps the original code's mask, which is one position late.
    """
    if config.kd_positions == "all_tokens":
        return next_token(batch["tokens"], batch["segments"] > 0)[1]
    return batch["loss_mask"] if config.kd_shift == "reference" else supervised


def add_router_losses(
    total: Array, metrics: Metrics, output: Output, config: LossConfig, weight: Array
) -> tuple[Array, Metrics]:
    """The loss with the router losses of a sparse model added once, and all metrics."""
    if output.router is not None:
        balance, z = balance_loss(output.router), z_loss(output.router)
        total = total + config.balance_weight * balance + config.router_z_weight * z
        stats = jax.lax.stop_gradient(output.router)
        layers = stats.tokens.shape[0]
        metrics["balance"] = (balance / layers * weight, weight)
        assigned = jnp.sum(stats.load) + jnp.sum(stats.dropped)
        metrics["dropped"] = (jnp.sum(stats.dropped), jnp.maximum(assigned, 1.0))
    metrics["loss"] = (total * weight, weight)
    return total, jax.lax.stop_gradient(metrics)
