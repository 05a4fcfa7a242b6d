"""Preference distillation: the DPO family with the teacher as the reference.

With log-likelihoods summed over the tokens of an answer, a pair has two log-ratios

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
from moddistill.losses.divergences import cross_entropy
from moddistill.losses.labels import next_token
from moddistill.losses.router import add_router_losses
from moddistill.models.batch import PreferenceBatch, concatenate_sides, num_tokens
from moddistill.models.vlm import Vlm
from moddistill.models.vocabulary import common_ids
from moddistill.params import merge
from moddistill.teachers.targets import Targets, Teacher


def preference_losses(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """Returns the loss of each pair from its two log-ratios r.

    `kto_pair` is the mean of the two halves that the reference code concatenates; its KL estimates
    are batch means, clipped at zero and, unlike in the reference, not differentiated (as in TRL).

    Args:
      kind: one of `PREFERENCE_KINDS`.
      beta: inverse temperature of the implicit rewards.
      label_smoothing: probability that chosen and rejected are swapped; `sigmoid` only.

    Raises:
      UserError: `kind` is unknown.
    """
    margin = chosen - rejected
    if kind == "sigmoid":
        # Bradley-Terry: P(chosen is preferred) = sigmoid(beta * margin).
        return -(
            (1 - label_smoothing) * jax.nn.log_sigmoid(beta * margin)
            + label_smoothing * jax.nn.log_sigmoid(-beta * margin)
        )
    if kind == "hinge":
        return jax.nn.relu(1 - beta * margin)
    if kind == "ipo":
        # Least squares to a finite margin, where DPO pushes it to infinity.
        return (margin - 1 / (2 * beta)) ** 2
    if kind == "kto_pair":
        # Each answer is compared with a reference point, the KL of student and teacher, estimated
        # from the other side's answers. A KL is never negative, but its estimate may be.
        kl_chosen = jax.lax.stop_gradient(jnp.maximum(jnp.mean(chosen), 0.0))
        kl_rejected = jax.lax.stop_gradient(jnp.maximum(jnp.mean(rejected), 0.0))
        chosen_loss = 1 - jax.nn.sigmoid(beta * (chosen - kl_rejected))
        rejected_loss = 1 - jax.nn.sigmoid(beta * (kl_chosen - rejected))
        return (chosen_loss + rejected_loss) / 2
    raise not_one_of("config.preference.kind", kind, PREFERENCE_KINDS)


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

    1. Log-likelihoods of the answers, pi of the student and ref of the teacher, without gradient.
    2. From L(pi - ref) and d L / d pi, a token loss that has the gradient of L (`_surrogate`).

    Args:
      chunk_size: positions whose logits are in memory at one time.
    """
    real_ids = common_ids(student.config.decoder.real_ids, teacher.real_ids)

    def denominators_of(batch: PreferenceBatch) -> Denominators:
        pairs = jnp.asarray(len(batch.chosen.tokens), jnp.float32)
        return {"pairs": pairs, "tokens": num_tokens(batch)}

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
        labels, supervised = next_token(answers.tokens, answers.loss_mask)
        token_sum = functools.partial(
            chunked_token_loss, labels=labels.reshape(-1), chunk_size=chunk_size, real_ids=real_ids
        )
        inputs = logit_inputs(output)
        teacher_logits = functools.partial(teacher.logits, real_ids=real_ids)
        policy, reference = _log_likelihoods(token_sum, teacher_logits, inputs, targets, supervised)

        def loss_of_pairs(policy: Array) -> tuple[Array, tuple[Array, Array]]:
            chosen, rejected = jnp.split(policy - reference, 2)
            losses = preference_losses(
                chosen, rejected, config.kind, config.beta, config.label_smoothing
            )
            return jnp.sum(losses) / denominators["pairs"], (chosen, rejected)

        # L as a function of the log-likelihoods only; `_surrogate` adds the models' gradients.
        (loss, ratios), d_policy = jax.value_and_grad(loss_of_pairs, has_aux=True)(policy)
        pairs = jnp.asarray(len(labels) / 2, jnp.float32)
        metrics = _preference_metrics(*ratios, config.beta, pairs)
        metrics["preference"] = (loss * denominators["pairs"], pairs)
        loss, metrics = add_router_losses(
            loss, metrics, output.router, router, denominators["tokens"]
        )
        metrics["loss"] = (loss * denominators["pairs"], pairs)
        loss = loss + _surrogate(token_sum, inputs, supervised, d_policy)
        return loss, jax.lax.stop_gradient(metrics)

    return Loss(denominators_of, micro_batch)


def _log_likelihoods(
    token_sum: Callable,
    teacher_logits: Callable[[Targets], Array],
    inputs: LogitInputs,
    targets: Targets,
    supervised: Bool[Array, "B T"],
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Returns log-likelihoods of the answers, without gradient: the student's, the teacher's."""

    def token_fn(logits: Array, targets: Targets, labels: Array) -> dict[str, Array]:
        return {
            "policy": -cross_entropy(logits, labels),
            "reference": -cross_entropy(teacher_logits(targets), labels),
        }

    mask = supervised.reshape(-1).astype(jnp.float32)
    weights = {"policy": mask, "reference": mask}
    inputs = jax.lax.stop_gradient(inputs)
    _, values = token_sum(token_fn, inputs, weights=weights, targets=targets)
    by_answer = [values[name].reshape(supervised.shape) for name in weights]
    policy, reference = (jnp.sum(x, axis=1) for x in by_answer)
    return policy, reference


def _surrogate(
    token_sum: Callable,
    inputs: LogitInputs,
    supervised: Bool[Array, "B T"],
    d_policy: Float[Array, "B"],
) -> Float[Array, ""]:
    """Returns 0, with the gradient of the preference loss.

    A chunk sees some tokens of an answer, while the loss L needs the sum over all of them,
    pi_i = sum_t log p_it. By the chain rule

        d L / d theta = sum_i (d L / d pi_i) sum_t d log p_it / d theta,

    which is the gradient of sum_it c_i log p_it with constants c_i = d L / d pi_i: a token loss
    with weights c_i. Its value means nothing and is subtracted; x - x is 0 to the last bit,
    however large x is.
    """

    def token_fn(logits: Array, _: Targets, labels: Array) -> dict[str, Array]:
        return {"policy": -cross_entropy(logits, labels)}

    weights = {"policy": (supervised * d_policy[:, None]).reshape(-1)}
    surrogate, _ = token_sum(token_fn, inputs, weights=weights)
    return surrogate - jax.lax.stop_gradient(surrogate)


def _preference_metrics(chosen: Array, rejected: Array, beta: float, weight: Array) -> Metrics:
    """Implicit rewards `beta * r`, their margin, and how often the chosen answer has the larger."""
    return {
        "reward_chosen": (beta * jnp.sum(chosen), weight),
        "reward_rejected": (beta * jnp.sum(rejected), weight),
        "reward_margin": (beta * jnp.sum(chosen - rejected), weight),
        "reward_accuracy": (jnp.sum(chosen > rejected).astype(jnp.float32), weight),
    }
