"""Forward KL to the teacher and cross entropy, at supervised positions."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moddistill.config import DistillationConfig, RouterLossConfig
from moddistill.errors import invalid
from moddistill.losses import Loss, Metrics, Totals
from moddistill.losses.chunked import Heads, next_token, rows, weighted_sum
from moddistill.losses.divergences import cross_entropy, forward_kl
from moddistill.losses.router import add_router_losses
from moddistill.models.vlm import Vlm
from moddistill.models.vocabulary import common_ids
from moddistill.params import merge
from moddistill.teachers.live import batch_for_teacher


def token_loss(
    student: Vlm,
    teacher: Vlm | None,
    config: DistillationConfig,
    router: RouterLossConfig,
    *,
    terms: tuple[str, ...],
    chunk_size: int,
) -> Loss:
    """The loss of the token stages: `terms` (of `kd` and `ce`), weighted, and router losses.

    Raises:
      UserError: if the weights of all `terms` are 0.
    """
    coefficient = {"kd": config.kd_weight, "ce": config.ce_weight}
    if not any(coefficient[name] for name in terms):
        names = " or ".join(f"{name}_weight" for name in terms)
        raise invalid(f"config.distillation.{names}", 0.0, "> 0")
    terms = tuple(name for name in terms if coefficient[name])

    def token_fn(logits: Array, teacher_logits: Array | None, labels: Array) -> dict[str, Array]:
        values = {"ce": cross_entropy(logits, labels)} if "ce" in terms else {}
        return values | ({"kd": forward_kl(logits, teacher_logits)} if "kd" in terms else {})

    def counted(batch: dict) -> dict[str, Array]:
        masks = {name: positions_of(name, batch, config) for name in terms}
        return {name: mask.reshape(-1).astype(jnp.float32) for name, mask in masks.items()}

    def totals(batch: dict) -> Totals:
        counts = {name: jnp.maximum(jnp.sum(mask), 1.0) for name, mask in counted(batch).items()}
        return counts | {"tokens": jnp.sum(batch["segments"] > 0).astype(jnp.float32)}

    def share(
        params: dict,
        frozen: dict,
        teacher_params: dict | None,
        batch: dict,
        totals: Totals,
        rng: Array,
    ) -> tuple[Array, Metrics]:
        output = student.apply({"params": merge(params, frozen)}, batch)
        labels = next_token(batch["tokens"], batch["loss_mask"])[0]
        heads = Heads(rows(output.hidden), output.head)
        real_ids = student.config.decoder.real_ids
        if "kd" in terms:
            theirs = batch_for_teacher(batch, output, teacher_params)
            target = jax.lax.stop_gradient(teacher.apply({"params": teacher_params}, theirs))
            heads = Heads(*heads[:2], rows(target.hidden), target.head)
            real_ids = common_ids(real_ids, teacher.config.decoder.real_ids)
        weights = counted(batch)
        total, values = weighted_sum(
            token_fn,
            heads,
            labels.reshape(-1),
            {name: weight * (coefficient[name] / totals[name]) for name, weight in weights.items()},
            chunk=chunk_size,
            real_ids=real_ids,
        )
        metrics = {
            name: (jnp.sum(values[name] * weights[name]), jnp.sum(weights[name])) for name in terms
        }
        total, metrics = add_router_losses(total, metrics, output.router, router, totals["tokens"])
        metrics["loss"] = (total * totals[terms[0]], jnp.sum(weights[terms[0]]))
        return total, jax.lax.stop_gradient(metrics)

    return Loss(totals, share)


def positions_of(term: str, batch: dict[str, Any], config: DistillationConfig) -> Array:
    """Where a term counts: predictions of answers; those of all real tokens, if KD asks for them.

    `kd_shift="reference"` keeps the original code's mask, which is one position late.
    """
    if term == "kd" and config.kd_positions == "all_tokens":
        return next_token(batch["tokens"], batch["segments"] > 0)[1]
    if term == "kd" and config.kd_shift == "reference":
        return batch["loss_mask"]
    return next_token(batch["tokens"], batch["loss_mask"])[1]
