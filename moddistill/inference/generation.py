"""Answers to many prompts, in rows that are refilled as answers finish.

Questions about the same images come first, and their common beginning is read once (`beginnings`);
then all others, the longest prompts first.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError
from moddistill.inference.answer import Answer, Decoding, Writing, end_id
from moddistill.inference.beginnings import Run, runs_of
from moddistill.inference.decode import without_drops
from moddistill.inference.prompts import Prompt, bucket, encode_prompt, load_images
from moddistill.inference.table import Table
from moddistill.models.vlm import Vlm

_AHEAD = 16  # prompts whose images are loaded before they are needed


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

    No answer depends on the others, since experts drop nothing; in bfloat16 up to rounding.

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
    table = Table(model, params, tokenizer, decoding, slots, len(waiting), draws)
    end = end_id(model.config.template, tokenizer)
    runs = deque(runs_of(waiting, prompts, model.config.image_token_id, table.shares))
    with ThreadPoolExecutor(2) as threads:
        ordered = [prompts[run.writings[0].number] for run in runs]
        images = _images_ahead(threads, ordered, model.config.vision)
        while runs or table.rests or table.unread:
            table.fill()
            while runs and table.free:
                table.begin(*_loaded(table.take(runs), images, on_error))
                table.fill()
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
) -> list[Writing]:
    """The answers to be written."""
    found = []
    for number, prompt in enumerate(prompts):
        try:
            ids = encode_prompt(prompt, model.config, tokenizer)
        except UserError as error:
            on_error(number, error)
        else:
            found.append(Writing(number, ids, decoding, model.config.context))
    return found


def _loaded(
    group: Sequence[Run],
    images: Iterator[Future[np.ndarray | None]],
    on_error: Callable[[int, UserError], None],
) -> tuple[list[Run], list[np.ndarray | None]]:
    """Returns the runs whose images can be read, and their images."""
    found: list[tuple[Run, np.ndarray | None]] = []
    for run in group:
        try:
            found.append((run, next(images).result()))
        except UserError as error:
            for writing in run.writings:
                on_error(writing.number, error)
    return [run for run, _ in found], [loaded for _, loaded in found]


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
