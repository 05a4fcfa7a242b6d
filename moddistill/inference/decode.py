"""Decoding with an explicit key/value cache, on one device or sharded over a mesh."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Int

from moddistill.data.chat_template import end_token
from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed.sharding import num_batch_shards
from moddistill.inference.placement import mesh_context, params_mesh, put_rows
from moddistill.inference.prompts import Prompt, prompt_batch
from moddistill.inference.sampling import Sampling, choose_token
from moddistill.models.batch import Batch
from moddistill.models.decoder import init_cache
from moddistill.models.logits import masked_logits
from moddistill.models.vlm import Vlm


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "end_id", "sampling"))
def decode(
    model: Vlm,
    params: dict[str, Any],
    batch: Batch,
    rng: jax.Array,
    *,
    max_new_tokens: int,
    end_id: int,
    sampling: Sampling,
) -> Int[Array, "B T"]:
    """Decodes new tokens [B, max_new_tokens], `end_id` from each row's end on.

    One call of the model reads all prompts, padded on the right, into the cache. Then each call
    reads one token per row, until every row has produced `end_id`.
    """
    # Right padding stays in the cache as empty slots: new tokens go to slots from `length` on, but
    # continue the positions of their own row from `lengths` on.
    rows, length = batch.tokens.shape
    lengths = jnp.sum(batch.segments > 0, axis=1, dtype=jnp.int32)
    slots = length + max_new_tokens
    decoder = model.config.decoder
    cache = init_cache(decoder, rows, slots, model.compute.dtype)
    output = model.apply({"params": params}, batch, cache)
    # The last token of each prompt predicts the first new one.
    hidden = jnp.take_along_axis(output.hidden, (lengths - 1)[:, None, None], axis=1)

    def next_token(output: Any, hidden: Array, step: Array) -> Array:
        logits = masked_logits(hidden[:, 0], output.head, decoder.real_ids)
        return choose_token(logits, sampling, jax.random.fold_in(rng, step))

    # carry: step, tokens [B, max_new_tokens] so far, cache, rows that have produced `end_id`.
    def unfinished(carry: Any) -> Bool[Array, ""]:
        step, _, _, done = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def body(carry: Any) -> Any:
        step, tokens, cache, done = carry
        last = jax.lax.dynamic_slice_in_dim(tokens, step - 1, 1, axis=1)
        # Rows share the cache slot `length + step - 1`, but each continues its own positions, so
        # that rotary embeddings are those of a prompt without padding.
        inputs = Batch(last, (lengths + step - 1)[:, None], jnp.ones_like(last))
        output = model.apply({"params": params}, inputs, cache)
        # Rows that have ended go on in step with the others; their tokens are discarded.
        token = jnp.where(done, end_id, next_token(output, output.hidden, step))
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], step, axis=1)
        return step + 1, tokens, output.cache, done | (token == end_id)

    # Step 0 has no new token to read: it follows from the prompts.
    first = next_token(output, hidden, jnp.zeros((), jnp.int32))
    tokens = jnp.full((rows, max_new_tokens), end_id, jnp.int32).at[:, 0].set(first)
    start = (jnp.ones((), jnp.int32), tokens, output.cache, first == end_id)
    tokens = jax.lax.while_loop(unfinished, body, start)[1]
    # Replicated, so that every process can read all rows. The cache needs no constraint: XLA gives
    # it the sharding of the inputs of the layers.
    return nn.with_logical_constraint(tokens, (None, None))


@dataclasses.dataclass(frozen=True)
class Answer:
    """The text and ids of an answer without its end token, and the ids of the prompt."""

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
    """Answers a batch of prompts; no answer depends on the others, since experts drop nothing.

    Args:
      params: on one device or sharded over a mesh, whose batch axes the rows are spread over. All
        processes of the mesh call this with the same prompts and get the same answers.

    Raises:
      UserError: if `<image>` does not occur once for every image of a prompt.
    """
    mesh = params_mesh(params)
    # Every batch shard needs the same number of rows.
    surplus = -len(prompts) % num_batch_shards(mesh) if mesh else 0
    batch = prompt_batch([*prompts, *prompts[:1] * surplus], model.config, tokenizer)
    end_id = _end_id(model.config.template, tokenizer)
    with mesh_context(mesh):
        new = decode(
            without_drops(model),
            params,
            put_rows(mesh, batch),
            jax.random.key(seed),
            max_new_tokens=max_new_tokens,
            end_id=end_id,
            sampling=sampling,
        )
    answers = []
    for row, ids in enumerate(np.asarray(new)[: len(prompts)]):
        ids = ids.tolist()
        ids = ids[: ids.index(end_id)] if end_id in ids else ids
        prompt_ids = batch.tokens[row][batch.segments[row] > 0]
        answers.append(Answer(tokenizer.decode(ids).strip(), ids, prompt_ids.tolist()))
    return answers


def without_drops(model: Vlm) -> Vlm:
    """Returns the model with experts that compute every assignment, without a capacity."""
    moe = model.config.decoder.moe
    if moe is None or moe.dispatch == "dropless":
        return model
    # All rows of a batch share an expert's capacity, so a drop in one depends on the others.
    moe = dataclasses.replace(moe, dispatch="dropless")
    decoder = dataclasses.replace(model.config.decoder, moe=moe)
    return model.clone(config=dataclasses.replace(model.config, decoder=decoder))


def _end_id(template: str, tokenizer: Tokenizer) -> int:
    """The id of the template's end token, or of a line break for a template without one."""
    end = end_token(template)
    return tokenizer.encode(end)[-1] if end.isspace() else tokenizer.special(end)
