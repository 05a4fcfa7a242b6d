"""Preference distillation: the DPO family with the teacher as the reference.

r is the difference of log-likelihoods (sums over answer tokens) of one answer between student and
teacher; a pair has r_chosen and r_rejected (Rafailov et al. 2023; LLaVA-MoD, section on preference
distillation).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moddistill.config import PREFERENCE_KINDS, PreferenceConfig, RouterLossConfig
from moddistill.errors import not_one_of
from moddistill.losses import Loss, Metrics, Totals
from moddistill.losses.chunked import Heads, next_token, rows, weighted_sum
from moddistill.losses.divergences import cross_entropy
from moddistill.losses.router import add_router_losses
from moddistill.models.vlm import Vlm
from moddistill.models.vocabulary import common_ids
from moddistill.params import merge
from moddistill.teachers.live import batch_for_teacher


def preference_losses(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """The loss of each pair from its two log-ratios r.

    `kto_pair` averages the two halves that the reference concatenates; its KL estimates are batch
    means, clipped at zero and, unlike the reference's, not differentiated (as in TRL).

    Raises:
      UserError: for an unknown kind.
    """
    margin = chosen - rejected
    if kind == "sigmoid":
        return -(
            (1 - label_smoothing) * jax.nn.log_sigmoid(beta * margin)
            + label_smoothing * jax.nn.log_sigmoid(-beta * margin)
        )
    if kind == "hinge":
        return jax.nn.relu(1 - beta * margin)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    if kind == "kto_pair":
        kl_chosen = jax.lax.stop_gradient(jnp.maximum(jnp.mean(chosen), 0.0))
        kl_rejected = jax.lax.stop_gradient(jnp.maximum(jnp.mean(rejected), 0.0))
        keep = 1 - jax.nn.sigmoid(beta * (chosen - kl_rejected))
        avoid = 1 - jax.nn.sigmoid(beta * (kl_chosen - rejected))
        return (keep + avoid) / 2
    raise not_one_of("config.preference.kind", kind, PREFERENCE_KINDS)


def preference_loss(
    student: Vlm,
    teacher: Vlm,
    config: PreferenceConfig,
    router: RouterLossConfig,
    *,
    chunk_size: int,
) -> Loss:
    """The loss of the preference stage; one forward of each model serves both answers of a pair.

    The student's gradient takes a second pass over the supervised positions: the first gives the
    log-likelihoods, from them each token's share in the loss is known, and the second is their
    weighted sum with that gradient.
    """

    def totals(batch: dict) -> Totals:
        sides = [batch[side]["segments"] for side in ("chosen", "rejected")]
        tokens = sum(jnp.sum(side > 0) for side in sides)
        return {
            "pairs": jnp.asarray(len(sides[0]), jnp.float32),
            "tokens": tokens.astype(jnp.float32),
        }

    def share(
        params: dict, frozen: dict, teacher_params: dict, batch: dict, totals: Totals, rng: Array
    ) -> tuple[Array, Metrics]:
        both = _concatenate(batch)
        output = student.apply({"params": merge(params, frozen)}, both)
        theirs = batch_for_teacher(both, output, teacher_params)
        target = teacher.apply({"params": teacher_params}, theirs)
        labels, supervised = next_token(both["tokens"], both["loss_mask"])
        summed = functools.partial(
            weighted_sum,
            _log_likelihood,
            labels=labels.reshape(-1),
            chunk=chunk_size,
            real_ids=common_ids(*(m.config.decoder.real_ids for m in (student, teacher))),
        )

        def log_likelihoods(heads: Heads) -> Array:
            weights = {"logp": supervised.reshape(-1).astype(jnp.float32)}
            _, values = summed(jax.lax.stop_gradient(heads), weights=weights)
            return jnp.sum(values["logp"].reshape(labels.shape), axis=1)

        def pair_loss(policy: Array) -> tuple[Array, tuple[Array, Array]]:
            chosen, rejected = jnp.split(policy - reference, 2)
            losses = preference_losses(
                chosen, rejected, config.kind, config.beta, config.label_smoothing
            )
            return jnp.sum(losses) / totals["pairs"], (chosen, rejected)

        heads = Heads(rows(output.hidden), output.head)
        policy = log_likelihoods(heads)
        reference = log_likelihoods(Heads(rows(target.hidden), target.head))
        (value, ratios), d_policy = jax.value_and_grad(pair_loss, has_aux=True)(policy)
        weights = {"logp": (supervised * d_policy[:, None]).reshape(-1)}
        surrogate, _ = summed(heads, weights=weights)
        pairs = jnp.asarray(len(labels) / 2, jnp.float32)
        metrics = _preference_metrics(*ratios, config.beta, pairs)
        metrics["preference"] = (value * totals["pairs"], pairs)
        value, metrics = add_router_losses(value, metrics, output.router, router, totals["tokens"])
        metrics["loss"] = (value * totals["pairs"], pairs)
        # The surrogate only has a gradient: the bracket is 0 to the bit, however large it is.
        total = value + (surrogate - jax.lax.stop_gradient(surrogate))
        return total, jax.lax.stop_gradient(metrics)

    return Loss(totals, share)


def _preference_metrics(chosen: Array, rejected: Array, beta: float, weight: Array) -> Metrics:
    """Implicit rewards `beta * r`, their margin, and how often the chosen answer is ahead."""
    return {
        "reward_chosen": (beta * jnp.sum(chosen), weight),
        "reward_rejected": (beta * jnp.sum(rejected), weight),
        "reward_margin": (beta * jnp.sum(chosen - rejected), weight),
        "reward_accuracy": (jnp.sum(chosen > rejected).astype(jnp.float32), weight),
    }


def _log_likelihood(logits: Array, _: None, labels: Array) -> dict[str, Array]:
    return {"logp": -cross_entropy(logits, labels)}


def _concatenate(batch: dict) -> dict:
    """Chosen answers first, rejected ones behind them, as one batch."""
    both = jax.tree.map(lambda *x: jnp.concatenate(x), batch["chosen"], batch["rejected"])
    if "images" in batch:
        both["images"] = batch["images"]
    return both
