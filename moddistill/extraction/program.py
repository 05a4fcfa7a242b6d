"""The jitted program of an extraction: from a batch to the teacher's targets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moddistill.losses.labels import next_token
from moddistill.models.batch import AnyBatch, Batch, PreferenceBatch, concatenate_sides
from moddistill.models.chunks import map_chunks
from moddistill.models.logits import MASKED, masked_logits
from moddistill.models.vlm import Vlm
from moddistill.teachers.entries import EntryFormat, TokenTargets


class Extracted(NamedTuple):
    """Targets at the positions that predict supervised tokens, zeros elsewhere.

    The two sides of preference pairs are one after the other, `[2 B, ...]`.

    Attributes:
      predicted: whether the next token is supervised.
      labels: the next tokens.
      targets: with arrays `[B, T, ...]`; of `answers` the log-probability of each token.
    """

    predicted: Bool[Array, "B T"]
    labels: Int[Array, "B T"]
    targets: TokenTargets


def make_extraction(
    model: Vlm, format: EntryFormat, temperature: float, seed: int, chunk_size: int
) -> Callable[[Any, AnyBatch, Array], Extracted]:
    """Returns `extracted = run(params, batch, records)`, a pure function.

    Args:
      seed: of drawn ids, which depend on it, the record and the position in the sample only.
      chunk_size: supervised positions whose logits are in memory at one time.

    `records` [B, T] are the numbers of the records that positions belong to.
    """

    def run(params: Any, batch: AnyBatch, records: Int[Array, "B T"]) -> Extracted:
        side: Batch = concatenate_sides(batch) if isinstance(batch, PreferenceBatch) else batch
        output = model.apply({"params": params}, side)
        labels, predicted = next_token(side.tokens, side.loss_mask, side.segments)
        hidden = output.hidden.reshape(-1, output.hidden.shape[-1])

        def targets_of(positions: tuple[Array, ...], head: Array) -> TokenTargets:
            hidden, labels, *places = positions
            logits = masked_logits(hidden, head, format.real_ids)
            return _targets(format, temperature, seed, logits, labels, *places)

        positions = [labels.reshape(-1)]
        if format.kind == "samples":
            positions += [records.reshape(-1), side.positions.reshape(-1)]
        found = map_chunks(
            targets_of,
            predicted.reshape(-1),
            (hidden, *positions),
            output.head,
            chunk_size=chunk_size,
        )
        rows = side.tokens.shape
        return Extracted(
            predicted, labels, jax.tree.map(lambda x: x.reshape(*rows, *x.shape[1:]), found)
        )

    return run


def _targets(
    format: EntryFormat,
    temperature: float,
    seed: int,
    logits: Float[Array, "C V"],
    labels: Int[Array, "C"],
    *places: Int[Array, "C"],
) -> TokenTargets:
    log_p = jax.nn.log_softmax(logits)
    label_logprobs = jnp.take_along_axis(log_p, labels[:, None], axis=1, mode="clip")[:, 0]
    if format.kind == "answers":
        return TokenTargets(label_logprobs)
    log_p = jax.nn.log_softmax(logits / temperature)
    if format.kind == "samples":
        ids = draw(log_p, seed, *places, count=format.ids)
        logprobs = jnp.take_along_axis(log_p, ids, axis=1)
        return TokenTargets(label_logprobs, ids=ids, logprobs=logprobs)
    logprobs, ids = jax.lax.top_k(log_p, format.ids)
    # Over the other ids only: 1 - sum_k p_k has no correct digit where the sum is nearly 1.
    others = jnp.put_along_axis(log_p, ids, MASKED, axis=1, inplace=False)
    log_rest = jax.nn.logsumexp(others, axis=1)
    return TokenTargets(label_logprobs, None, ids, logprobs, log_rest)


def draw(
    log_p: Float[Array, "C V"],
    seed: int,
    records: Int[Array, "C"],
    positions: Int[Array, "C"],
    *,
    count: int,
) -> Int[Array, "C K"]:
    """Returns ids drawn with replacement, by the inverse of the cumulative distribution.

    One random number per id, where Gumbel noise would take one for each id of the vocabulary.
    """
    key = jax.random.key(seed)

    def of_position(log_p: Array, record: Array, position: Array) -> Array:
        mine = jax.random.fold_in(jax.random.fold_in(key, record), position)
        return inverse_cumulative(log_p, jax.random.uniform(mine, (count,)))

    return jax.vmap(of_position)(log_p, records, positions)


def inverse_cumulative(log_p: Array, uniform: Array) -> Array:
    """Returns the ids at which the cumulative distribution exceeds numbers from 0 to below 1."""
    # XLA adds in parts, whose rounding may let a sum fall where probabilities are 0.
    cumulative = jax.lax.cummax(jnp.cumsum(jnp.exp(log_p)))
    ids = jnp.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    # Rounding may also end beyond the last id of a token.
    is_token = jnp.take(log_p, ids, mode="fill", fill_value=MASKED) > MASKED / 2
    return jnp.where(is_token, ids, jnp.argmax(log_p)).astype(jnp.int32)
