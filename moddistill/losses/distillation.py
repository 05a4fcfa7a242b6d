"""Next-token losses: a divergence from the teacher and cross entropy, at supervised positions.

    loss = kd_weight * mean_t D(teacher_t, student_t) - ce_weight * mean_t log p_student(y_t)
           + router losses of a sparse student

D is KL(teacher || student) or another one of `divergences`.

Each mean is over the positions of its own mask in the global batch.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from moddistill.config import DistillationConfig, RouterLossConfig
from moddistill.errors import invalid
from moddistill.losses import Denominators, Loss, Metrics
from moddistill.losses.chunked import TokenFn, chunked_token_loss, logit_inputs
from moddistill.losses.divergences import cross_entropy, divergence_to
from moddistill.losses.labels import next_token
from moddistill.losses.router import add_router_losses
from moddistill.models.batch import Batch, num_tokens
from moddistill.models.vlm import Vlm
from moddistill.models.vocabulary import IdRanges, common_ids
from moddistill.params import merge
from moddistill.teachers.targets import NO_TARGETS, Targets, Teacher


def token_loss(
    student: Vlm,
    teacher: Teacher | None,
    config: DistillationConfig,
    router: RouterLossConfig,
    *,
    terms: tuple[str, ...],
    chunk_size: int,
) -> Loss:
    """Returns the loss of the token stages.

    Args:
      teacher: None where `terms` has no `kd`.
      terms: `kd`, `ce` or both; a term whose weight is 0 is not computed.
      chunk_size: positions whose logits are in memory at one time.

    Raises:
      UserError: the weights of all terms are 0.
    """
    coefficients = _coefficients(config, terms)
    terms = tuple(coefficients)
    real_ids = student.config.decoder.real_ids
    if "kd" in terms:
        real_ids = common_ids(real_ids, teacher.real_ids)
    token_fn = _token_fn(teacher, config, terms, real_ids)

    def flat_masks(batch: Batch) -> dict[str, Array]:
        masks = loss_masks(batch, config, terms)
        return {name: mask.reshape(-1).astype(jnp.float32) for name, mask in masks.items()}

    def denominators_of(batch: Batch) -> Denominators:
        masks = flat_masks(batch)
        counts = {name: jnp.maximum(jnp.sum(mask), 1.0) for name, mask in masks.items()}
        return counts | {"tokens": num_tokens(batch)}

    def micro_batch(
        params: dict,
        frozen: dict,
        teacher_params: Any,
        batch: Batch,
        denominators: Denominators,
        _: Array,
    ) -> tuple[Array, Metrics]:
        output = student.apply({"params": merge(params, frozen)}, batch)
        targets = teacher.targets(teacher_params, batch, output) if "kd" in terms else NO_TARGETS
        masks = flat_masks(batch)
        # Divided by the number of positions in the global batch, not in this part of it.
        weights = {
            name: mask * (coefficients[name] / denominators[name]) for name, mask in masks.items()
        }
        loss, values = chunked_token_loss(
            token_fn,
            logit_inputs(output),
            next_token(batch.tokens, batch.loss_mask, batch.segments)[0].reshape(-1),
            weights,
            targets,
            chunk_size=chunk_size,
            real_ids=real_ids,
        )
        metrics = {
            name: (jnp.sum(values[name] * masks[name]), jnp.sum(masks[name])) for name in terms
        }
        loss, metrics = add_router_losses(
            loss, metrics, output.router, router, denominators["tokens"]
        )
        # As a mean over the first term's positions: sums over micro-batches give `loss` again.
        metrics["loss"] = (loss * denominators[terms[0]], jnp.sum(masks[terms[0]]))
        return loss, jax.lax.stop_gradient(metrics)

    return Loss(denominators_of, micro_batch)


def _coefficients(config: DistillationConfig, terms: tuple[str, ...]) -> dict[str, float]:
    """Returns the weights of terms whose weight is not 0; UserError if there is none."""
    weights = {"kd": config.kd_weight, "ce": config.ce_weight}
    nonzero = {name: weights[name] for name in terms if weights[name]}
    if not nonzero:
        names = " or ".join(f"{name}_weight" for name in terms)
        raise invalid(f"config.distillation.{names}", 0.0, "> 0")
    return nonzero


def _token_fn(
    teacher: Teacher | None, config: DistillationConfig, terms: tuple[str, ...], real_ids: IdRanges
) -> TokenFn:
    """Returns the token function of `chunked_token_loss` that computes `terms`."""

    def token_fn(logits: Array, targets: Targets, labels: Array) -> dict[str, Array]:
        values = {}
        if "kd" in terms:
            known = teacher.predictions(targets, real_ids)
            values["kd"] = divergence_to(known, logits, config)
        if "ce" in terms:
            values["ce"] = cross_entropy(logits, labels)
        return values

    return token_fn


def loss_masks(
    batch: Batch, config: DistillationConfig, terms: tuple[str, ...]
) -> dict[str, Bool[Array, "B T"]]:
    """Returns the positions at which each term is computed.

    `ce` counts at predictions of supervised tokens, and so does `kd` by default. Variants of `kd`:
    `kd_positions="all_tokens"` counts the predictions of all tokens but the first of each sample;
    `kd_shift="reference"` is the mask of the original code, which is not shifted with the labels:
    one position late. With a cache, `kd` counts where it has targets. The student's own answers are
    no labels, so `ce` does not count there.
    """
    _, supervised = next_token(batch.tokens, batch.loss_mask, batch.segments)
    masks = {"ce": supervised, "kd": supervised}
    if config.kd_positions == "all_tokens":
        masks["kd"] = next_token(batch.tokens, batch.segments > 0, batch.segments)[1]
    elif config.kd_shift == "reference":
        masks["kd"] = batch.loss_mask
    if batch.teacher is not None:
        masks["kd"] &= batch.teacher.known
    if batch.on_policy is not None:
        masks["ce"] &= ~batch.on_policy[:, None]
    return {name: masks[name] for name in terms}
