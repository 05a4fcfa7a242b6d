"""Preference distillation: the DPO family with the teacher as the reference.

With log-likelihoods summed over the tokens of an answer, a segment of its row, a pair has two
log-ratios

    r = log p_student(answer) - log p_teacher(answer),   r_chosen and r_rejected,

and `beta * r` is the implicit reward of an answer.

References:
  DPO: https://arxiv.org/abs/2305.18290; IPO: https://arxiv.org/abs/2310.12036; KTO:
  https://arxiv.org/abs/2402.01306; LLaVA-MoD, preference distillation:
  https://arxiv.org/abs/2408.15881.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moddistill.config import PREFERENCE_KINDS, PreferenceConfig, RouterLossConfig
from moddistill.errors import not_one_of
from moddistill.losses import Denominators, Loss, Metrics
from moddistill.losses.chunked import LogitInputs, chunked_token_loss, logit_inputs
from moddistill.losses.divergences import cross_entropy, label_logprobs
from moddistill.losses.labels import next_token
from moddistill.losses.likelihoods import sum_by_segment, surrogate
from moddistill.losses.router import add_router_losses
from moddistill.models.batch import (
    PreferenceBatch,
    concatenate_sides,
    num_samples,
    num_tokens,
    sample_starts,
)
from moddistill.models.vlm import Vlm
from moddistill.models.vocabulary import common_ids
from moddistill.params import merge
from moddistill.teachers.targets import Predictions, Targets, Teacher


def preference_losses(
    chosen: Float[Array, "*B"],
    rejected: Float[Array, "*B"],
    is_pair: Bool[Array, "*B"],
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*B"]:
    """Returns the loss of each pair from its two log-ratios r, and 0 where there is no pair.

    `kto_pair` is the mean of the two halves that the reference code concatenates; its KL estimates
    are means over pairs, clipped at zero and, unlike in the reference, not differentiated (as in
    TRL).

    Args:
      is_pair: false at entries of the arrays that belong to no pair.
      kind: one of `PREFERENCE_KINDS`.
      beta: inverse temperature of the implicit rewards.
      label_smoothing: probability that chosen and rejected are swapped; `sigmoid` only.

    Raises:
      UserError: `kind` is unknown.
    """
    margin = chosen - rejected
    if kind == "sigmoid":
        # Bradley-Terry: P(chosen is preferred) = sigmoid(beta * margin).
        losses = -(
            (1 - label_smoothing) * jax.nn.log_sigmoid(beta * margin)
            + label_smoothing * jax.nn.log_sigmoid(-beta * margin)
        )
    elif kind == "hinge":
        losses = jax.nn.relu(1 - beta * margin)
    elif kind == "ipo":
        # Least squares to a finite margin, where DPO pushes it to infinity.
        losses = (margin - 1 / (2 * beta)) ** 2
    elif kind == "kto_pair":
        # Each answer is compared with a reference point, the KL of student and teacher, estimated
        # from the other side's answers. A KL is never negative, but its estimate may be.
        kl_chosen, kl_rejected = (_clipped_mean(ratios, is_pair) for ratios in (chosen, rejected))
        chosen_loss = 1 - jax.nn.sigmoid(beta * (chosen - kl_rejected))
        rejected_loss = 1 - jax.nn.sigmoid(beta * (kl_chosen - rejected))
        losses = (chosen_loss + rejected_loss) / 2
    else:
        raise not_one_of("config.preference.kind", kind, PREFERENCE_KINDS)
    return jnp.where(is_pair, losses, 0.0)


def _clipped_mean(ratios: Array, is_pair: Array) -> Array:
    """The mean over pairs, at least 0, without gradient; 0 if there is no pair."""
    total = jnp.sum(jnp.where(is_pair, ratios, 0.0))
    mean = total / jnp.maximum(jnp.sum(is_pair), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def preference_loss(
    student: Vlm,
    teacher: Teacher,
    config: PreferenceConfig,
    router: RouterLossConfig,
    *,
    chunk_size: int,
) -> Loss:
    """Returns the loss of the preference stage.

    One forward pass of each model reads both answers of all pairs, and two passes over chunks of
    supervised positions contract hidden states with the head:

    1. Log-probabilities of the answers' tokens under student and teacher, without gradient. Their
       sums over the segments of a row are the log-likelihoods pi and ref.
    2. From L(pi - ref) and d L / d pi, a token loss that has the gradient of L (`surrogate`).

    Args:
      chunk_size: positions whose logits are in memory at one time.
    """
    real_ids = common_ids(student.config.decoder.real_ids, teacher.real_ids)

    def denominators_of(batch: PreferenceBatch) -> Denominators:
        return {"pairs": jnp.maximum(num_samples(batch), 1.0), "tokens": num_tokens(batch)}

    def micro_batch(
        params: dict,
        frozen: dict,
        teacher_params: Any,
        batch: PreferenceBatch,
        denominators: Denominators,
        _: Array,
    ) -> tuple[Array, Metrics]:
        answers = concatenate_sides(batch)
        output = student.apply({"params": merge(params, frozen)}, answers)
        targets = teacher.targets(teacher_params, answers, output)
        labels, supervised = next_token(answers.tokens, answers.loss_mask, answers.segments)
        token_sum = functools.partial(
            chunked_token_loss, labels=labels.reshape(-1), chunk_size=chunk_size, real_ids=real_ids
        )
        inputs = logit_inputs(output)
        predictions = functools.partial(teacher.predictions, real_ids=real_ids)
        policy, reference = _log_probs(token_sum, predictions, inputs, targets, supervised)
        is_pair = sum_by_segment(sample_starts(batch.chosen), batch.chosen.segments) > 0

        def loss_of_pairs(policy: Array) -> tuple[Array, tuple[Array, Array]]:
            ratios = sum_by_segment(policy - reference, answers.segments)
            chosen, rejected = jnp.split(ratios, 2)
            losses = preference_losses(
                chosen, rejected, is_pair, config.kind, config.beta, config.label_smoothing
            )
            return jnp.sum(losses) / denominators["pairs"], (chosen, rejected)

        # L as a function of the log-probabilities only; `surrogate` adds the models' gradients.
        (loss, ratios), d_policy = jax.value_and_grad(loss_of_pairs, has_aux=True)(policy)
        pairs = num_samples(batch)
        metrics = _preference_metrics(*ratios, config.beta, pairs)
        metrics["preference"] = (loss * denominators["pairs"], pairs)
        loss, metrics = add_router_losses(
            loss, metrics, output.router, router, denominators["tokens"]
        )
        metrics["loss"] = (loss * denominators["pairs"], pairs)
        loss = loss + surrogate(token_sum, inputs, supervised, d_policy)
        return loss, jax.lax.stop_gradient(metrics)

    return Loss(denominators_of, micro_batch)


def _log_probs(
    token_sum: Callable,
    predictions: Callable[[Targets], Predictions],
    inputs: LogitInputs,
    targets: Targets,
    supervised: Bool[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns log-probabilities of the answers' tokens, without gradient: student's, teacher's."""

    def token_fn(logits: Array, targets: Targets, labels: Array) -> dict[str, Array]:
        return {
            "policy": -cross_entropy(logits, labels),
            "reference": label_logprobs(predictions(targets), labels),
        }

    mask = supervised.reshape(-1).astype(jnp.float32)
    weights = {"policy": mask, "reference": mask}
    inputs = jax.lax.stop_gradient(inputs)
    _, values = token_sum(token_fn, inputs, weights=weights, targets=targets)
    policy, reference = (values[name].reshape(supervised.shape) for name in weights)
    return policy, reference


def _preference_metrics(chosen: Array, rejected: Array, beta: float, weight: Array) -> Metrics:
    """Implicit rewards `beta * r`, their margin, and how often the chosen answer has the larger."""
    return {
        "reward_chosen": (beta * jnp.sum(chosen), weight),
        "reward_rejected": (beta * jnp.sum(rejected), weight),
        "reward_margin": (beta * jnp.sum(chosen - rejected), weight),
        "reward_accuracy": (jnp.sum(chosen > rejected).astype(jnp.float32), weight),
    }
