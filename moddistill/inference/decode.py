"""The programs of decoding: `admit` reads prompts into rows, `step` adds a token to each row.

`begin` makes rows of some prompts and nothing else, within a program. `read_beginnings` reads what
several prompts begin with, before `admit` reads the rest of each.

Rows are independent: each has its own slots of the key/value cache, its own position and random
keys, so that a prompt takes the place of one that is answered while the others go on.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from moddistill.inference.sampling import Sampling, choose_tokens
from moddistill.models.batch import Batch
from moddistill.models.decoder import init_cache
from moddistill.models.kv_cache import KVCache
from moddistill.models.logits import masked_logits
from moddistill.models.vlm import Output, Vlm


@flax.struct.dataclass
class Rows:
    """Answers in progress.

    Attributes:
      last: the newest token, which is not in the cache yet.
      rngs: a key of each answer.
      count: tokens of each answer so far.
      seen: the tokens of prompts and answers, if these are penalised.
    """

    cache: KVCache
    last: Int[Array, "B"]
    rngs: Array
    count: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None


class Shared(NamedTuple):
    """Beginnings of prompts that several of them have in common.

    Attributes:
      batch: the beginnings, padded on the right, without their images.
      cache: their keys and values.
      of: of each prompt, the row of its beginning.
    """

    batch: Batch
    cache: KVCache
    of: Int[Array, "G"]


class Choice(NamedTuple):
    """The new tokens, and log-probabilities before any setting of `Sampling`.

    Attributes:
      top: the most probable tokens, and `top_logprobs` those of them.
    """

    tokens: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    top: Int[Array, "B n"]
    top_logprobs: Float[Array, "B n"]


@functools.partial(jax.jit, static_argnames=("model", "rows", "slots", "sampling"))
def empty_rows(model: Vlm, rows: int, slots: int, sampling: Sampling) -> Rows:
    """Rows without an answer, for prompts and answers of up to `slots` tokens together."""
    decoder = model.config.decoder
    zeros = jnp.zeros(rows, jnp.int32)
    seen = jnp.zeros((rows, decoder.vocab_size), bool) if sampling.penalises else None
    rngs = jax.random.split(jax.random.key(0), rows)
    cache = init_cache(decoder, model.compute, rows, slots)
    return Rows(_sharded(cache), zeros, rngs, zeros, seen)


@functools.partial(jax.jit, static_argnames="model")
def read_beginnings(model: Vlm, params: dict[str, Any], batch: Batch) -> KVCache:
    """Keys and values of beginnings of prompts, padded on the right."""
    cache = init_cache(model.config.decoder, model.compute, *batch.tokens.shape)
    return model.apply({"params": params}, batch, cache).cache


_STATIC = ("model", "sampling", "top_logprobs")


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="rows")
def admit(
    model: Vlm,
    params: dict[str, Any],
    rows: Rows,
    batch: Batch,
    at: Int[Array, "G"],
    rngs: Array,
    shared: Shared | None = None,
    *,
    sampling: Sampling,
    top_logprobs: int,
) -> tuple[Rows, Choice]:
    """Reads prompts, padded on the right, into the rows `at`, and chooses their first tokens.

    Args:
      at: beyond the last row for prompts that only fill the batch.
      rngs: a key for each prompt.
      shared: beginnings, of which `batch` has the rests; None if it has whole prompts.
    """
    count, length = batch.tokens.shape
    decoder = model.config.decoder
    if shared is None:
        cache = init_cache(decoder, model.compute, count, length)
    else:
        cache = _continued(shared, length)
    batch = batch._replace(positions=batch.positions + cache.length[:, None])
    seen = None
    if sampling.penalises:
        seen = _tokens_of(batch, decoder.vocab_size)
        if shared is not None:
            seen |= _tokens_of(shared.batch, decoder.vocab_size)[shared.of]
    new, choice = begin(
        model, params, batch, cache, rngs, seen, sampling=sampling, top_logprobs=top_logprobs
    )

    def put(old: Array, new: Array) -> Array:
        return old.at[at].set(new, mode="drop")

    # Beginnings and rests are padded, so that slots without a token may be beyond those of a row.
    slots = rows.cache.segments.shape[1]
    used = min(slots, new.cache.segments.shape[1])

    def put_slots(old: Array, new: Array) -> Array:  # [repeats, B, S, ...] from [..., G, T, ...]
        return old.at[:, at, :used].set(new[:, :, :used], mode="drop")

    segments = jnp.pad(new.cache.segments[:, :used], ((0, 0), (0, slots - used)))
    cache = KVCache(
        jax.tree.map(put_slots, rows.cache.layers, new.cache.layers),
        put(rows.cache.segments, segments),
        put(rows.cache.length, new.cache.length),
    )
    old, new = ((x.last, x.rngs, x.count, x.seen) for x in (rows, new))
    return Rows(_sharded(cache), *jax.tree.map(put, old, new)), choice


def begin(
    model: Vlm,
    params: dict[str, Any],
    batch: Batch,
    cache: KVCache,
    rngs: Array,
    seen: Bool[Array, "B V"] | None = None,
    *,
    sampling: Sampling,
    top_logprobs: int,
) -> tuple[Rows, Choice]:
    """Reads prompts, padded on the right, into a cache of theirs, and chooses their first tokens.

    Args:
      cache: empty, or with the beginnings of the prompts; its slots are those of the new rows.
      seen: the tokens of the prompts, if these are penalised.
    """
    output = model.apply({"params": params}, batch, cache)
    # The last token of each prompt predicts the first new one.
    last = jnp.sum(batch.segments > 0, axis=1) - 1
    hidden = jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)
    counts = jnp.zeros(len(last), jnp.int32)
    drawn = rngs, counts, seen
    choice, seen = _choose(model, output, hidden, drawn, sampling, top_logprobs)
    return Rows(_sharded(output.cache), choice.tokens, rngs, counts + 1, seen), choice


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="rows")
def step(
    model: Vlm,
    params: dict[str, Any],
    rows: Rows,
    *,
    sampling: Sampling,
    top_logprobs: int,
) -> tuple[Rows, Choice]:
    """Reads the newest token of each row and chooses the next; also in rows without an answer."""
    tokens = rows.last[:, None]
    batch = Batch(tokens, rows.cache.length[:, None], jnp.ones_like(tokens))
    output = model.apply({"params": params}, batch, rows.cache)
    drawn = rows.rngs, rows.count, rows.seen
    choice, seen = _choose(model, output, output.hidden, drawn, sampling, top_logprobs)
    cache = _sharded(output.cache)
    return Rows(cache, choice.tokens, rows.rngs, rows.count + 1, seen), choice


def _continued(shared: Shared, length: int) -> KVCache:
    """The cache of each prompt after its beginning, with `length` slots for its rest."""
    cache = shared.cache

    def extend(x: Array) -> Array:  # [repeats, G, T + length, K, H] from [repeats, U, T, K, H]
        return jnp.pad(x[:, shared.of], ((0, 0), (0, 0), (0, length), (0, 0), (0, 0)))

    segments = jnp.pad(cache.segments[shared.of], ((0, 0), (0, length)))
    layers = jax.tree.map(extend, cache.layers)
    return _sharded(KVCache(layers, segments, cache.length[shared.of]))


def _tokens_of(batch: Batch, vocab_size: int) -> Bool[Array, "B V"]:
    """Marks the tokens of each row."""
    real = jnp.where(batch.segments > 0, batch.tokens, vocab_size)
    seen = jnp.zeros((len(real), vocab_size), bool)
    return jax.vmap(lambda seen, ids: seen.at[ids].set(True, mode="drop"))(seen, real)


def _sharded(cache: KVCache) -> KVCache:
    """A cache that is sharded like the activations of the layers."""
    constrain = nn.with_logical_constraint
    axes = (None, "act_batch", None, "kv_heads", None)
    layers = jax.tree.map(lambda x: constrain(x, axes), cache.layers)
    return cache.replace(layers=layers, segments=constrain(cache.segments, ("act_batch", None)))


def _choose(
    model: Vlm,
    output: Output,
    hidden: Float[Array, "B 1 D"],
    drawn: tuple[Array, Int[Array, "B"], Bool[Array, "B V"] | None],
    sampling: Sampling,
    top_logprobs: int,
) -> tuple[Choice, Bool[Array, "B V"] | None]:
    """Returns the tokens that follow hidden states, and the tokens seen with them.

    Args:
      drawn: keys of the rows, how many tokens they have drawn, and the tokens seen so far.
    """
    rngs, count, seen = drawn
    logits = masked_logits(hidden[:, 0], output.head, model.config.decoder.real_ids)
    rngs = jax.vmap(jax.random.fold_in)(rngs, count)
    tokens = choose_tokens(logits, sampling, rngs, seen)
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    top_values, top = jax.lax.top_k(logprobs, top_logprobs)
    # Replicated, so that every process can read all rows.
    choice = Choice(tokens, chosen, top.astype(jnp.int32), top_values)
    choice = jax.tree.map(lambda x: nn.with_logical_constraint(x, (None,) * x.ndim), choice)
    if seen is not None:
        seen = jax.vmap(lambda seen, token: seen.at[token].set(True))(seen, tokens)
    return choice, seen


def without_drops(model: Vlm) -> Vlm:
    """Returns the model with experts that compute every assignment, without a capacity."""
    moe = model.config.decoder.moe
    if moe is None or moe.dispatch == "dropless":
        return model
    # All rows of a batch share an expert's capacity, so a drop in one depends on the others.
    moe = dataclasses.replace(moe, dispatch="dropless")
    decoder = dataclasses.replace(model.config.decoder, moe=moe)
    return model.clone(config=dataclasses.replace(model.config, decoder=decoder))
