"""Decoding with an explicit key/value cache, and one answer from the command line.

    python -m moddistill.generate --model DIR --image FILE --prompt TEXT [--json]

Prompts of a batch may differ in length: each row has its own positions and sees its own tokens
alone, so with dropless experts an answer does not depend on the rows beside it.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moddistill.cli import plain_errors
from moddistill.data.conversation import end_token
from moddistill.data.examples import encode_prompt
from moddistill.data.images import load_image, mean_color, preprocess
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.losses.chunked import logits_of
from moddistill.models.decoder import init_cache
from moddistill.models.vlm import ModelConfig, Vlm
from moddistill.storage.model_folder import as_model_folder, load


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Greedy for temperature 0; otherwise the smallest set of tokens of probability `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; accepted: 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; accepted: above 0, at most 1")


def choose_token(
    logits: Float[Array, "B V"], sampling: Sampling, rng: jax.Array
) -> Int[Array, "B"]:
    """The next token of each row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    ordered = -jnp.sort(-logits, axis=-1)
    before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
    # The likeliest token always stays, since nothing is before it.
    floor = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    kept = jnp.where(logits >= floor, logits, -jnp.inf)
    return jax.random.categorical(rng, kept).astype(jnp.int32)


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
    cache = init_cache(decoder, rows, slots, model.dtype)
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
class Prompt:
    """A question with `<image>` where an image stands, the turns before it, and the image files."""

    question: str
    images: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """The text and ids of an answer without its end token, and the ids it was given."""

    text: str
    token_ids: list[int]
    prompt_ids: list[int]


def prompt_batch(
    prompts: Sequence[Prompt], config: ModelConfig, tokenizer: Tokenizer, multiple: int = 16
) -> dict[str, np.ndarray]:
    """Arrays of a batch of prompts, padded on the right to a common multiple of `multiple`."""
    tower = config.vision
    patches = tower.patches if tower else 0
    ids = [
        encode_prompt(
            config.template, prompt.history, prompt.question, len(prompt.images), tokenizer, patches
        )
        for prompt in prompts
    ]
    length = -max(map(len, ids)) // multiple * -multiple
    tokens = np.full((len(ids), length), tokenizer.pad_id, np.int32)
    segments = np.zeros((len(ids), length), np.int32)
    for row, prompt_ids in enumerate(ids):
        tokens[row, : len(prompt_ids)] = prompt_ids
        segments[row, : len(prompt_ids)] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "segments": segments, "positions": positions}
    count = max(len(prompt.images) for prompt in prompts)
    if count:
        shape = (len(ids), count, tower.image_size, tower.image_size, 3)
        batch["images"] = np.zeros(shape, np.uint8)
        for row, prompt in enumerate(prompts):
            for slot, path in enumerate(prompt.images):
                image = preprocess(load_image(path), tower.image_size, mean_color(tower.mean))
                batch["images"][row, slot] = image
    return batch


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
      ValueError: when `<image>` is not written once for every image.
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


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.generate`."""
    parser = argparse.ArgumentParser(prog="python -m moddistill.generate", description=__doc__)
    parser.add_argument(
        "--model", required=True, help="model folder, or Hugging Face folder or name"
    )
    parser.add_argument("--image", action="append", default=[], help="file; repeat for several")
    parser.add_argument(
        "--prompt", required=True, help=f"question; without {IMAGE}, images go first"
    )
    parser.add_argument("--json", action="store_true", help="print text, token_ids and prompt_ids")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help="probability that is sampled from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max_new_tokens is {args.max_new_tokens}; accepted: 1 or more")
    for path in args.image:
        if not Path(path).is_file():
            parser.error(f"--image {path!r}: no such file")
    with plain_errors():
        result = _answer_one(args)
    print(json.dumps(dataclasses.asdict(result), ensure_ascii=False) if args.json else result.text)


def _answer_one(args: argparse.Namespace) -> Answer:
    sampling = Sampling(args.temperature, args.top_p)
    folder = as_model_folder(args.model)
    model, params = load(folder)
    question = args.prompt
    if IMAGE not in question:
        question = f"{IMAGE}\n" * len(args.image) + question
    [result] = answer(
        model,
        params,
        load_tokenizer(str(folder)),
        [Prompt(question, tuple(args.image))],
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        seed=args.seed,
    )
    return result


if __name__ == "__main__":
    main()
