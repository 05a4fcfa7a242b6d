"""Answers to many prompts: rows are refilled as answers finish, the longest prompts first.

The host is one step ahead of the device: it reads the tokens of a step while the next one is
computed. An answer that ends leaves one token behind, which is dropped.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed.sharding import num_batch_shards
from moddistill.errors import UserError
from moddistill.inference.answer import Answer, Decoding, TokenLogprobs, Writing, end_id
from moddistill.inference.batching import batch_rows
from moddistill.inference.decode import Choice, Rows, admit, empty_rows, step, without_drops
from moddistill.inference.placement import mesh_context, params_mesh, put_rows
from moddistill.inference.prompts import (
    Prompt,
    bucket,
    encode_prompt,
    load_images,
    prompt_batch,
)
from moddistill.models.vlm import Vlm

_AHEAD = 16  # prompts whose images are loaded before they are needed
_MOST_TOKENS = 16_384  # of prompts that are read together; more need memory and no less time


def answer(
    model: Vlm,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    decoding: Decoding,
) -> list[Answer]:
    """Returns the answers in the order of the prompts; arguments and errors as `generate`."""
    found = dict(generate(model, params, tokenizer, prompts, decoding))
    return [found[number] for number in range(len(prompts))]


def generate(
    model: Vlm,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    on_error: Callable[[int, UserError], None] | None = None,
    draws: Sequence[int] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Yields the number and the answer of each prompt, in the order in which they finish.

    No answer depends on the others, since experts drop nothing.

    Args:
      on_error: called with the number of a prompt that cannot be answered, in place of the error.
      draws: of each prompt, the number that its sampling depends on besides the seed; by default
        its own. So the rest of a list is answered as in the whole of it.
      params: on one device or sharded over a mesh, whose batch axes the rows are spread over. All
        processes of the mesh call this with the same prompts and get the same answers.

    Raises:
      UserError: a question is empty, `<image>` does not occur once for every image of a prompt, a
        prompt is longer than the model's context, or an image cannot be read.
    """
    for writing in _write(model, params, tokenizer, prompts, decoding, on_error or _raise, draws):
        if writing.ended:
            yield writing.number, writing.answer(tokenizer)


def stream(
    model: Vlm,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    prompt: Prompt,
    decoding: Decoding,
) -> Iterator[str | Answer]:
    """Yields the text of an answer in parts, as it is written, and at last the answer.

    Arguments and errors as `generate`.
    """
    shown = ""
    for writing in _write(model, params, tokenizer, [prompt], decoding, _raise):
        text = writing.settled(tokenizer)
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
        if writing.ended:
            yield writing.answer(tokenizer)


def _raise(_: int, error: UserError) -> None:
    raise error


def _write(
    model: Vlm,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    on_error: Callable[[int, UserError], None],
    draws: Sequence[int] | None = None,
) -> Iterator[Writing]:
    """Yields an answer after each of its tokens; those that have `ended` for the last time."""
    model = without_drops(model)
    waiting = _waiting(model, tokenizer, prompts, decoding, on_error)
    if not waiting:
        return
    slots = bucket(max(len(each.prompt_ids) + each.max_new_tokens for each in waiting))
    draws = range(len(prompts)) if draws is None else draws
    table = _Table(model, params, tokenizer, decoding, slots, len(waiting), draws)
    end = end_id(model.config.template, tokenizer)
    with ThreadPoolExecutor(2) as threads:
        ordered = [prompts[writing.number] for writing in waiting]
        images = _images_ahead(threads, ordered, model.config.vision)
        while waiting or table.unread:
            while waiting and table.free:
                group, loaded = [], []
                for _ in range(table.group_size(waiting)):
                    writing, future = waiting.popleft(), next(images)
                    try:
                        loaded.append(future.result())
                        group.append(writing)
                    except UserError as error:
                        on_error(writing.number, error)
                table.admit(group, loaded)
            table.step()
            for writing, token in table.read():
                writing.add(token, end, tokenizer)
                if writing.ended:
                    table.release(writing)
                yield writing


def _waiting(
    model: Vlm,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    on_error: Callable[[int, UserError], None],
) -> "deque[Writing]":
    """The answers to be written, of the longest prompt first.

    So those that are read together have about one length, and too little memory is noticed at once.
    """
    found = []
    for number, prompt in enumerate(prompts):
        try:
            ids = encode_prompt(prompt, model.config, tokenizer)
        except UserError as error:
            on_error(number, error)
        else:
            found.append(Writing(number, ids, decoding, model.config.context))
    return deque(sorted(found, key=lambda writing: -len(writing.prompt_ids)))


def _images_ahead(
    threads: ThreadPoolExecutor, prompts: Sequence[Prompt], tower: Any
) -> Iterator[Future[np.ndarray | None]]:
    """Yields the images of each prompt, while threads load those of the next ones."""
    futures: deque[Future[np.ndarray | None]] = deque()
    ahead = iter(prompts)
    for _ in prompts:
        for prompt in itertools.islice(ahead, _AHEAD - len(futures)):
            futures.append(threads.submit(load_images, prompt, tower))
        yield futures.popleft()


class _Table:
    """Rows on the device, the answers that are written in them, and tokens that are not read yet.

    Args:
      slots: of each row.
      prompts: their number; there are no more rows.
      draws: as in `generate`.
    """

    def __init__(
        self,
        model: Vlm,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        decoding: Decoding,
        slots: int,
        prompts: int,
        draws: Sequence[int],
    ):
        self.model, self.params, self.pad_id = model, params, tokenizer.pad_id
        self.draws = draws
        self.mesh = params_mesh(params)
        self.shards = num_batch_shards(self.mesh) if self.mesh else 1
        self.static = {"sampling": decoding.sampling, "top_logprobs": decoding.top_logprobs}
        self.rng = jax.random.key(decoding.seed)
        rows = batch_rows(model, params, slots, prompts)
        self.writing: list[Writing | None] = [None] * rows
        self.unread: deque[tuple[list[tuple[int, Writing]], Choice]] = deque()
        with mesh_context(self.mesh):
            self.rows: Rows = empty_rows(model, rows, slots, decoding.sampling)

    @property
    def free(self) -> list[int]:
        """Rows without an answer."""
        return [row for row, writing in enumerate(self.writing) if writing is None]

    def group_size(self, waiting: Sequence[Writing]) -> int:
        """Returns the number of prompts to read next.

        It is a power of four for each shard, so that few programs are compiled.
        """
        most = min(len(self.free), len(waiting), max(1, _MOST_TOKENS // len(waiting[0].prompt_ids)))
        if most < self.shards:
            return most
        return self.shards * 4 ** (((most // self.shards).bit_length() - 1) // 2)

    def admit(self, group: Sequence[Writing], images: Sequence[np.ndarray | None]) -> None:
        """Begins answers, of whose prompts the first one is the longest."""
        if not group:
            return
        at = self.free[: len(group)]
        for row, writing in zip(at, group, strict=True):
            self.writing[row] = writing
        fill = -len(group) % self.shards  # every batch shard needs the same number of prompts
        ids = [writing.prompt_ids for writing in group]
        batch = prompt_batch(ids + ids[:1] * fill, [*images, *images[:1] * fill], self.pad_id)
        draws = jnp.array([self.draws[writing.number] for writing in group] + [0] * fill)
        with mesh_context(self.mesh):
            self.rows, choice = admit(
                self.model,
                self.params,
                self.rows,
                put_rows(self.mesh, batch),
                jnp.array(at + [len(self.writing)] * fill, jnp.int32),
                jax.vmap(jax.random.fold_in, (None, 0))(self.rng, draws),
                **self.static,
            )
        self._dispatched(list(enumerate(group)), choice)

    def step(self) -> None:
        """Computes one more token of the answers that may have one."""
        writing = [
            (row, each)
            for row, each in enumerate(self.writing)
            if each is not None and each.dispatched < each.max_new_tokens
        ]
        if not writing:
            return
        with mesh_context(self.mesh):
            self.rows, choice = step(self.model, self.params, self.rows, **self.static)
        self._dispatched(writing, choice)

    def _dispatched(self, writing: list[tuple[int, Writing]], choice: Choice) -> None:
        for _, each in writing:
            each.dispatched += 1
        self.unread.append((writing, choice))

    def read(self) -> Iterator[tuple[Writing, TokenLogprobs]]:
        """Yields the tokens of all but the newest program; of that one too if none follows."""
        while len(self.unread) > 1 or (self.unread and not self._continues()):
            writing, choice = self.unread.popleft()
            tokens, logprobs, top, top_logprobs = map(np.ndarray.tolist, jax.device_get(choice))
            for row, each in writing:
                if not each.ended:
                    pairs = tuple(zip(top[row], top_logprobs[row], strict=True))
                    yield each, TokenLogprobs(tokens[row], logprobs[row], pairs)

    def _continues(self) -> bool:
        return any(
            each is not None and each.dispatched < each.max_new_tokens for each in self.writing
        )

    def release(self, writing: Writing) -> None:
        """Frees the row of a finished answer."""
        self.writing[self.writing.index(writing)] = None
