"""Decoding with an explicit key/value cache.

Prompts of a batch may differ in length.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from moddistill.data.conversation import end_token
from moddistill.data.tokenizer import Tokenizer
from moddistill.inference.prompts import Prompt, prompt_batch
from moddistill.inference.sampling import Sampling, choose_token
from moddistill.losses.chunked import logits_of
from moddistill.models.decoder import init_cache
from moddistill.models.vlm import Vlm


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "end_id", "sampling"))
def decode(
    model: Vlm,
    params: dict[str, Any],
    batch: dict[str, Array],
    rng: jax.Array,
    *,
    max_new_tokens: int,
    end_id: int,
    sampling: Sampling,
) -> Int[Array, "B T"]:
    """New tokens [B, max_new_tokens] after prompts padded on the right; `end_id` fills up.

    The prompt is read once; then one token at a time, until every row has produced `end_id`.
    """
    rows, length = batch["tokens"].shape
    prompt = batch["segments"] > 0
    lengths = jnp.sum(prompt, axis=1, dtype=jnp.int32)
    slots = length + max_new_tokens
    decoder = model.config.decoder
    causal = jnp.tril(jnp.ones((length, length), bool)) | jnp.eye(length, dtype=bool)
    mask = jnp.pad(causal[None] & prompt[:, None], ((0, 0), (0, 0), (0, max_new_tokens)))
    cache = init_cache(decoder, rows, slots, model.compute.dtype)
    output = model.apply({"params": params}, batch | {"mask": mask}, cache)
    hidden = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)

    def next_token(output: Any, hidden: Array, step: Array) -> Array:
        logits = logits_of(hidden[:, 0], output.head, decoder.real_ids)
        return choose_token(logits, sampling, jax.random.fold_in(rng, step))

    def unfinished(carry: Any) -> Bool[Array, ""]:
        step, _, _, done = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def body(carry: Any) -> Any:
        step, tokens, cache, done = carry
        last = jax.lax.dynamic_slice_in_dim(tokens, step - 1, 1, axis=1)
        seen = jnp.pad(prompt, ((0, 0), (0, max_new_tokens)))
        seen = seen | ((jnp.arange(slots) >= length) & (jnp.arange(slots) < length + step))[None]
        inputs = {
            "tokens": last,
            "positions": (lengths + step - 1)[:, None],
            "segments": jnp.ones_like(last),
            "mask": seen[:, None],
            "start": length + step - 1,
        }
        output = model.apply({"params": params}, inputs, cache)
        token = jnp.where(done, end_id, next_token(output, output.hidden, step))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        return step + 1, tokens, output.cache, done | (token == end_id)

    first = next_token(output, hidden, jnp.zeros((), jnp.int32))
    tokens = jnp.full((rows, max_new_tokens), end_id, jnp.int32).at[:, 0].set(first)
    start = (jnp.ones((), jnp.int32), tokens, output.cache, first == end_id)
    return jax.lax.while_loop(unfinished, body, start)[1]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The text and ids of an answer without its end token, and the ids it was given."""

    text: str
    token_ids: list[int]
    prompt_ids: list[int]


def answer(
    model: Vlm,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[Answer]:
    """Answers of a batch of prompts, each as if it were alone: experts drop nothing.

    Raises:
      UserError: when `<image>` is not written once for every image.
    """
    batch = prompt_batch(prompts, model.config, tokenizer)
    end_id = _end_id(model.config.template, tokenizer)
    new = decode(
        without_drops(model),
        params,
        batch,
        jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        end_id=end_id,
        sampling=sampling,
    )
    answers = []
    for row, ids in enumerate(np.asarray(new)):
        ids = ids.tolist()
        ids = ids[: ids.index(end_id)] if end_id in ids else ids
        real = batch["tokens"][row][batch["segments"][row] > 0]
        answers.append(Answer(tokenizer.decode(ids).strip(), ids, real.tolist()))
    return answers


def without_drops(model: Vlm) -> Vlm:
    """The model with experts that compute every assignment, whatever it was trained with."""
    moe = model.config.decoder.moe
    if moe is None or moe.dispatch == "dropless":
        return model
    moe = dataclasses.replace(moe, dispatch="dropless")
    decoder = dataclasses.replace(model.config.decoder, moe=moe)
    return model.clone(config=dataclasses.replace(model.config, decoder=decoder))


def _end_id(template: str, tokenizer: Tokenizer) -> int:
    """The id that ends an answer; that of a line break where the template has no end token."""
    end = end_token(template)
    return tokenizer.encode(end)[-1] if end.isspace() else tokenizer.special(end)
