"""Rows on the device, refilled as answers finish.

The host is one step ahead of the device: it reads the tokens of a step while the next one is
computed. An answer that ends leaves one token behind, which is dropped.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed.sharding import num_batch_shards
from moddistill.inference.answer import Decoding, TokenLogprobs, Writing
from moddistill.inference.batching import batch_rows
from moddistill.inference.beginnings import Run
from moddistill.inference.decode import (
    Choice,
    Rows,
    Shared,
    admit,
    empty_rows,
    read_beginnings,
    step,
)
from moddistill.inference.placement import mesh_context, params_mesh, put_rows
from moddistill.inference.prompts import prompt_batch
from moddistill.models.batch import Batch
from moddistill.models.vlm import Vlm

MOST_TOKENS = 16_384  # of prompts that are read together; more need memory and no less time


class Table:
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

    @property
    def most_shared(self) -> int:
        """The most prompts of which a beginning is read once; it needs memory as a row does."""
        return max(1, len(self.writing) - self.shards)

    def take(self, runs: "deque[Run]") -> list[Run]:
        """Removes the runs to read next; none while there are not rows enough for the first one.

        Their number is a power of four for each shard, so that few programs are compiled.
        """
        free, rows, tokens, count = len(self.free), 0, 0, 0
        for run in runs:
            rows += len(run.writings)
            tokens += run.tokens
            beginnings = self._whole_shards(count + 1) if run.shared else 0
            too_many = rows > free or rows + beginnings > len(self.writing)
            # One of two kinds is read at a time.
            other = bool(run.shared) != bool(runs[0].shared)
            if too_many or other or (count and tokens > MOST_TOKENS):
                break
            count += 1
        if count > self.shards:
            count = self.shards * 4 ** (((count // self.shards).bit_length() - 1) // 2)
        return [runs.popleft() for _ in range(count)]

    def admit(self, runs: Sequence[Run], images: Sequence[np.ndarray | None]) -> None:
        """Begins answers, of whose prompts the first one is the longest."""
        group = [writing for run in runs for writing in run.writings]
        if not group:
            return
        at = self.free[: len(group)]
        for row, writing in zip(at, group, strict=True):
            self.writing[row] = writing
        shared, size = None, self._whole_shards(len(group))
        if runs[0].shared:
            shared, size = self._read_beginnings(runs, images)
            images = [None] * len(group)
        rests = [each.prompt_ids[run.shared :] for run in runs for each in run.writings]
        batch = self._batch(rests, images, size)
        fill = size - len(group)
        draws = jnp.array([self.draws[writing.number] for writing in group] + [0] * fill)
        with mesh_context(self.mesh):
            self.rows, choice = admit(
                self.model,
                self.params,
                self.rows,
                batch,
                jnp.array(at + [len(self.writing)] * fill, jnp.int32),
                jax.vmap(jax.random.fold_in, (None, 0))(self.rng, draws),
                shared,
                **self.static,
            )
        self._dispatched(list(enumerate(group)), choice)

    def _read_beginnings(
        self, runs: Sequence[Run], images: Sequence[np.ndarray | None]
    ) -> tuple[Shared, int]:
        """Returns the beginnings of runs, and the number of rests to read after them.

        It is a power of four for each shard, or all rows, so that few programs are compiled.
        """
        ids = [run.writings[0].prompt_ids[: run.shared] for run in runs]
        batch = self._batch(ids, images, self._whole_shards(len(runs)))
        with mesh_context(self.mesh):
            cache = read_beginnings(self.model, self.params, batch)
        of = [number for number, run in enumerate(runs) for _ in run.writings]
        size = self.shards
        while size < len(of):
            size *= 4
        size = min(size, len(self.writing) - len(batch.tokens))
        of = jnp.array(of + [0] * (size - len(of)), jnp.int32)
        return Shared(batch._replace(images=None), cache, of), size

    def _whole_shards(self, count: int) -> int:
        """A number rounded up, as every batch shard needs the same number of prompts."""
        return count + -count % self.shards

    def _batch(self, ids: list[list[int]], images: Sequence[np.ndarray | None], size: int) -> Batch:
        """The tokens and images as `size` rows, filled up with the first one."""
        fill = size - len(ids)
        batch = prompt_batch(ids + ids[:1] * fill, [*images, *images[:1] * fill], self.pad_id)
        return put_rows(self.mesh, batch)

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
