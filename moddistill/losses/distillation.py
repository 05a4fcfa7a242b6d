"""Losses of the token stages: divergences from the teacher, and cross entropy.

    loss = kd_weight * mean_t D(teacher_t, student_t) - ce_weight * mean_t log p_student(y_t)
           + image_kd_weight * mean_x D(teacher_x, student_x)
           + relation_weight * mean_i relation(teacher_i, student_i)
           + router losses of a sparse student

D is KL(teacher || student) or another one of `divergences`, t are supervised positions, x patches
and i images. Each mean is over the positions (or images) of its own mask in the global batch.

Of a teacher with other tokens, chunks of text count in the first mean too.

The terms of images are those of LLaVA-KD, which has the weights 1, 1 and 0.5 for `kd`, `image_kd`
and `relation`. They compare the outputs at the patches themselves: no token is to be predicted
there, so nothing is shifted. The original training code is not released; the divergences in its
repository are means over the positions of a micro-batch.

References:
  LLaVA-KD: https://arxiv.org/abs/2410.16236.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moddistill.config import DistillationConfig, RouterLossConfig
from moddistill.errors import invalid
from moddistill.losses import Denominators, Loss, Metrics
from moddistill.losses.chunked import TokenFn, chunked_token_loss, logit_inputs
from moddistill.losses.divergences import cross_entropy, divergence_to
from moddistill.losses.labels import next_token
from moddistill.losses.relation import image_patches, image_relations
from moddistill.losses.router import add_router_losses
from moddistill.losses.text_chunks import chunk_loss
from moddistill.models.batch import LAST, Batch, image_positions, num_tokens
from moddistill.models.vlm import ModelConfig, Vlm
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
      teacher: None where `terms` has only `ce`.
      terms: some of `kd`, `ce`, `image_kd`, `relation`; one whose weight is 0 is not computed.
      chunk_size: positions whose logits are in memory at one time.

    Raises:
      UserError: the weights of all terms, or of all but `relation`, are 0.
    """
    coefficients = _coefficients(config, terms)
    terms = tuple(coefficients)
    real_ids = student.config.decoder.real_ids
    if uses_teacher := terms != ("ce",):
        real_ids = common_ids(real_ids, teacher.real_ids)
    token_fn = _token_fn(teacher, config, terms, real_ids)
    flat_masks = functools.partial(_flat_masks, config=config, terms=terms, student=student.config)

    def denominators_of(batch: Batch) -> Denominators:
        counts = jax.tree.map(lambda x: jnp.maximum(x, 1.0), _counts(batch, flat_masks(batch)))
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
        targets = teacher.targets(teacher_params, batch, output) if uses_teacher else NO_TARGETS
        counts = _counts(batch, masks := flat_masks(batch))
        # Divided by the number of positions (images) in the global batch, not in this part of it.
        weights = {n: mask * (coefficients[n] / denominators[n]) for n, mask in masks.items()}
        per_image = weights.pop("relation", None)
        labels = next_token(batch.tokens, batch.loss_mask, batch.segments)[0].reshape(-1)
        token_sum = functools.partial(
            chunked_token_loss, labels=labels, chunk_size=chunk_size, real_ids=real_ids
        )
        inputs = logit_inputs(output)
        loss, values = token_sum(token_fn, inputs, weights=weights, targets=targets)
        if per_image is not None:
            index = image_patches(batch, student.config).index
            relations = image_relations(inputs, teacher.logit_inputs(targets), index, real_ids)
            values["relation"] = relations.reshape(-1)
            loss += jnp.sum(per_image * values["relation"])
        sums = {name: jnp.sum(values[name] * mask) for name, mask in masks.items()}
        if "kd" in terms and _has_chunks(batch):
            chunks = batch.teacher.chunk, targets.chunk_logprobs
            weight = coefficients["kd"] / denominators["kd"]
            of_chunks, total = chunk_loss(token_sum, inputs, *chunks, weight)
            loss, sums["kd"] = loss + of_chunks, sums["kd"] + total
        metrics = {name: (sums[name], counts[name]) for name in masks}
        tokens = denominators["tokens"]
        loss, metrics = add_router_losses(loss, metrics, output.router, router, tokens)
        # As a mean over the first term's positions: sums over micro-batches give `loss` again.
        metrics["loss"] = (loss * denominators[terms[0]], counts[terms[0]])
        return loss, jax.lax.stop_gradient(metrics)

    return Loss(denominators_of, micro_batch)


def _counts(batch: Batch, masks: dict[str, Array]) -> dict[str, Array]:
    """Returns how many positions, chunks of text or images each term is a mean over."""
    counts = {name: jnp.sum(mask) for name, mask in masks.items()}
    if "kd" in masks and _has_chunks(batch):
        counts["kd"] += jnp.sum(batch.teacher.chunk == LAST)
    return counts


def _has_chunks(batch: Batch) -> bool:
    return batch.teacher is not None and batch.teacher.chunk is not None


def _coefficients(config: DistillationConfig, terms: tuple[str, ...]) -> dict[str, float]:
    """Returns the weights of terms whose weight is not 0; UserError if no token has a loss."""
    weights = {name: getattr(config, f"{name}_weight") for name in terms}
    # A relation fixes no output, only how alike some are.
    of_tokens = [name for name in terms if name != "relation"]
    if not any(weights[name] for name in of_tokens):
        names = " or ".join(f"{name}_weight" for name in of_tokens)
        raise invalid(f"config.distillation.{names}", 0.0, "> 0")
    return {name: weight for name, weight in weights.items() if weight}


def _token_fn(
    teacher: Teacher | None, config: DistillationConfig, terms: tuple[str, ...], real_ids: IdRanges
) -> TokenFn:
    """Returns the token function of `chunked_token_loss` that computes `terms`."""
    # One computation, which each of them counts at its own positions.
    divergences = [name for name in terms if name in ("kd", "image_kd")]

    def token_fn(logits: Array, targets: Targets, labels: Array) -> dict[str, Array]:
        values = {}
        if divergences:
            known = teacher.predictions(targets, real_ids)
            values = dict.fromkeys(divergences, divergence_to(known, logits, config))
        if "ce" in terms:
            values["ce"] = cross_entropy(logits, labels)
        return values

    return token_fn


def _flat_masks(
    batch: Batch, config: DistillationConfig, terms: tuple[str, ...], student: ModelConfig
) -> dict[str, Float[Array, "T"]]:
    """Returns the masks of a batch as vectors of 0 and 1."""
    masks = loss_masks(batch, config, terms, student)
    return {name: mask.reshape(-1).astype(jnp.float32) for name, mask in masks.items()}


def loss_masks(
    batch: Batch, config: DistillationConfig, terms: tuple[str, ...], student: ModelConfig
) -> dict[str, Bool[Array, "B T"] | Bool[Array, "B I"]]:
    """Returns the positions at which each term is computed, or the images for `relation`.

    `ce` counts at predictions of supervised tokens, and so does `kd` by default. Variants of `kd`:
    `kd_positions="all_tokens"` counts the predictions of all tokens but the first of each sample;
    `kd_shift="reference"` is the mask of the original code, which is not shifted with the labels:
    one position late. With a cache, or a teacher of another layout, `kd` counts where there are
    targets of a token. `image_kd` counts at patches. The student's own answers are no labels, so
    `ce` does not count there.
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
    if "image_kd" in terms:
        masks["image_kd"] = image_positions(batch, student.image_token_id)
    if "relation" in terms:
        masks["relation"] = image_patches(batch, student).used
    return {name: masks[name] for name in terms}
