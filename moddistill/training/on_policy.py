"""On-policy distillation: the student answers a share of a batch itself, and the teacher scores it.

A student that reads answers of records only does not learn to go on after its own mistakes. So some
rows get its own answers before the step, which computes the divergence there (GKD, Agarwal et al.
2024, https://arxiv.org/abs/2306.13649). No gradient passes through the choice of tokens.
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from moddistill.config import TrainConfig
from moddistill.distributed.sharding import batch_sharding, replicated
from moddistill.inference.answer import Decoding
from moddistill.inference.decode import Rows, begin, step, without_drops
from moddistill.inference.sampling import Sampling
from moddistill.losses import Metrics
from moddistill.models.batch import Batch
from moddistill.models.decoder import init_cache
from moddistill.models.vlm import Vlm
from moddistill.models.vocabulary import IdRanges
from moddistill.params import Flat, cast_frozen, merge
from moddistill.training.step import micro_batches

_RANDOMNESS = 0x6F6E2D70  # that of a step folds in its number, which is smaller

Answer = Callable[[Flat, Flat, Batch, Int[Array, ""]], tuple[Batch, Metrics]]


class Answers(NamedTuple):
    """Answers of the student to the prompts of some rows.

    Attributes:
      tokens: the first `counts` ones of each row are its answer, with the end token.
      ended: whether the last one is the end token.
    """

    tokens: Int[Array, "B N"]
    counts: Int[Array, "B"]
    ended: Bool[Array, "B"]


def make_answer(config: TrainConfig, student: Vlm, ids: IdRanges, end: int, mesh: Mesh) -> Answer:
    """Returns `batch, metrics = answer(params, frozen, batch, step)`, jitted.

    Of every q rows the student answers the first p, p / q = `on_policy.share`: equally many on each
    device, where they stay, and the same ones on every mesh. Randomness is that of the seed, the
    step and the number of the row. At one time it answers as many rows as it would of a
    micro-batch, so that more micro-batches take less memory; which rows these are, is the same.

    Args:
      ids: tokens that the student may choose, those of the teacher too.
      end: the token that ends an answer.
    """
    settings = config.on_policy
    sampling = Sampling(temperature=settings.temperature, top_p=settings.top_p)
    decoding = Decoding(max_new_tokens=settings.tokens, sampling=sampling)
    share = Fraction(round(settings.share * config.batch_size), config.batch_size)
    model = _decoding_student(student, ids)

    def answer(
        params: Flat, frozen: Flat, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Batch, Metrics]:
        # As the step computes with them. Each token reads all, which are larger in float32.
        weights = cast_frozen(merge(params, frozen), model.compute.dtype)
        batch = batch._replace(on_policy=jnp.zeros(len(batch.tokens), bool))
        mine, rest = _split((batch, _row_rngs(config.seed, step, len(batch.tokens))), share)

        def part(rows: tuple[Batch, Array]) -> tuple[Batch, Answers]:
            found = answer_prompts(model, weights, *rows, decoding, end)
            return with_answers(rows[0], found)._replace(images=None), found

        parts = jax.lax.map(part, micro_batches(mine, config.grad_accum_steps))
        answered, found = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
        batch = _join(answered, rest[0]._replace(images=None), share)._replace(images=batch.images)
        return batch, _metrics(found)

    return jax.jit(answer, out_shardings=(batch_sharding(mesh), replicated(mesh)))


def with_answers_of_the_student(answer: Answer, step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `state, metrics = step(state, teacher, batch)` that answers its batch first."""

    def run(state: Any, teacher: Any, batch: Batch) -> tuple[Any, Metrics]:
        batch, answered = answer(state.params, state.frozen, batch, state.step)
        state, metrics = step(state, teacher, batch)
        return state, metrics | answered

    return run


def _decoding_student(student: Vlm, ids: IdRanges) -> Vlm:
    """The student as it decodes, which may choose some tokens only."""
    model = without_drops(student.clone(compute=student.compute.without_gradients()))
    decoder = dataclasses.replace(model.config.decoder, real_ids=ids)
    return model.clone(config=dataclasses.replace(model.config, decoder=decoder))


def _row_rngs(seed: int, step: Int[Array, ""], rows: int) -> Array:
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _RANDOMNESS), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))


def _split(rows: Any, share: Fraction) -> tuple[Any, Any]:
    """The first p of every q rows, and the rest, without axis B: [B / q, p, ...] -> [S, ...]."""
    first, every = share.numerator, share.denominator

    def groups(x: Array) -> Array:
        # Devices have whole groups, so that XLA moves no row.
        return x.reshape(-1, every, *x.shape[1:])

    mine = jax.tree.map(lambda x: groups(x)[:, :first].reshape(-1, *x.shape[1:]), rows)
    return mine, jax.tree.map(lambda x: groups(x)[:, first:], rows)


def _join(mine: Any, rest: Any, share: Fraction) -> Any:
    """Rows in the order that they had before `_split`."""

    def joined(x: Array, others: Array) -> Array:
        groups = x.reshape(-1, share.numerator, *x.shape[1:])
        return jnp.concatenate([groups, others], axis=1).reshape(-1, *x.shape[1:])

    return jax.tree.map(joined, mine, rest)


def _metrics(answers: Answers) -> Metrics:
    """Mean length of the answers, and the share of those with an end token."""
    number = jnp.sum(answers.counts > 0, dtype=jnp.float32)
    values = {"answer_tokens": answers.counts, "answer_ended": answers.ended}
    return {name: (jnp.sum(x, dtype=jnp.float32), number) for name, x in values.items()}


def answer_starts(batch: Batch) -> Int[Array, "B"]:
    """Returns the position of each row's last answer; 0 in rows without an answer or a prompt.

    Rows are one sample each. An answer is a run of supervised tokens.
    """
    before = jnp.pad(batch.loss_mask, ((0, 0), (1, 0)))[:, :-1]
    places = jnp.arange(batch.tokens.shape[1])
    return jnp.max(jnp.where(batch.loss_mask & ~before, places[None], 0), axis=1)


def answer_prompts(
    model: Vlm, params: dict[str, Any], batch: Batch, rngs: Array, decoding: Decoding, end: int
) -> Answers:
    """Answers what precedes the last answer of each row, as long as the row has room.

    Args:
      rngs: a key of each row.
      end: the token that ends an answer.
    """
    rows, length = batch.tokens.shape
    starts = answer_starts(batch)
    most = min(decoding.max_new_tokens, length)
    budget = jnp.where(starts > 0, jnp.minimum(length - starts, most), 0)
    static = {"sampling": decoding.sampling, "top_logprobs": 0}
    # An answer takes the place of the record's, so that the slots of a row suffice.
    cache = init_cache(model.config.decoder, model.compute, rows, length)
    before = jnp.arange(length)[None] < starts[:, None]
    prompts = batch._replace(segments=jnp.where(before, batch.segments, 0))

    def add(answers: Answers, number: Int[Array, ""], tokens: Int[Array, "B"]) -> Answers:
        # A row that is done goes on, but its tokens do not count.
        active = ~answers.ended & (number < budget)
        written = answers.tokens.at[:, number].set(tokens)
        written = nn.with_logical_constraint(written, ("act_batch", None))
        return Answers(written, answers.counts + active, answers.ended | (active & (tokens == end)))

    def go_on(state: tuple[Rows, Answers, Int[Array, ""]]) -> Bool[Array, ""]:
        _, answers, number = state
        return jnp.any(~answers.ended & (number < budget))

    def write(
        state: tuple[Rows, Answers, Int[Array, ""]],
    ) -> tuple[Rows, Answers, Int[Array, ""]]:
        table, answers, number = state
        table, choice = step(model, params, table, **static)
        return table, add(answers, number, choice.tokens), number + 1

    table, choice = begin(model, params, prompts, cache, rngs, **static)
    zeros = jnp.zeros(rows, jnp.int32)
    answers = Answers(jnp.zeros((rows, most), jnp.int32), zeros, zeros > 0)
    first = add(answers, jnp.int32(0), choice.tokens)
    return jax.lax.while_loop(go_on, write, (table, first, jnp.int32(1)))[1]


def with_answers(batch: Batch, answers: Answers) -> Batch:
    """Returns rows with these answers in place of their last ones, and only these supervised.

    Rows whose answer has no token stay as they are.
    """
    starts = answer_starts(batch)[:, None]
    ends = starts + answers.counts[:, None]
    places = jnp.arange(batch.tokens.shape[1])[None]
    index = jnp.clip(places - starts, 0, answers.tokens.shape[1] - 1)
    new = jnp.take_along_axis(answers.tokens, index, axis=1)
    is_new, is_real = (places >= starts) & (places < ends), places < ends
    own = answers.counts > 0
    changed = {
        "tokens": jnp.where(is_real, jnp.where(is_new, new, batch.tokens), 0),
        "positions": jnp.where(is_real, places, 0),
        "segments": is_real.astype(jnp.int32),
        "loss_mask": is_new,
    }
    fields = {name: jnp.where(own[:, None], x, getattr(batch, name)) for name, x in changed.items()}
    return batch._replace(on_policy=own, **fields)
