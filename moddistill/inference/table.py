"""Rows on the device, refilled as answers finish.

The host is one step ahead of the device: it reads the tokens of a step while the next one is
computed. After the end of an answer one more token is computed, which is dropped.
"""

import itertools
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
from moddistill.inference.prompts import bucket, prompt_batch
from moddistill.models.batch import Batch
from moddistill.models.kv_cache import KVCache
from moddistill.models.vlm import Vlm

MOST_TOKENS = 16_384  # of prompts that are read together; more need memory and no less time


class Table:
    """Rows on the device, the answers that are written in them, and tokens that are not read yet.

    Args:
      slots: of each row.
      prompts: their number; there are no more rows.
      draws: as in `generate`.

    Attributes:
      shares: whether what prompts have in common is read once.
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
        # Beginnings that are read, and of each prompt the number of its beginning, and its rest.
        self.beginnings: tuple[Batch, KVCache] | None = None
        self.rests: deque[tuple[int, list[int], Writing]] = deque()
        # A beginning takes memory as a row does, which one row for each shard may not leave.
        self.shares = rows > self.shards
        with mesh_context(self.mesh):
            self.rows: Rows = empty_rows(model, rows, slots, decoding.sampling)

    @property
    def free(self) -> list[int]:
        """Rows without an answer."""
        return [row for row, writing in enumerate(self.writing) if writing is None]

    def take(self, runs: "deque[Run]") -> list[Run]:
        """Removes the runs to read next: whole prompts for free rows, or beginnings.

        Their number is a power of four for each shard, so that few programs are compiled.
        """
        shared, longest, count = bool(runs[0].shared), 0, 0
        # Beginnings take memory besides the rows.
        most = max(self.shards, len(self.writing) // 8) if shared else len(self.free)
        for run in itertools.islice(runs, most):
            longest = max(longest, run.tokens)  # to which the others are padded
            too_many = count and (count + 1) * longest > MOST_TOKENS
            if bool(run.shared) != shared or too_many:
                break
            count += 1
        return [runs.popleft() for _ in range(self._power(4, count))]

    def begin(self, runs: Sequence[Run], images: Sequence[np.ndarray | None]) -> None:
        """Reads whole prompts into free rows, or beginnings, after which `fill` reads the rests."""
        if not runs:
            return
        if not runs[0].shared:
            group = [run.writings[0] for run in runs]
            self._admit(group, [each.prompt_ids for each in group], images)
            return
        ids = [run.writings[0].prompt_ids[: run.shared] for run in runs]
        batch = self._batch(ids, images)
        with mesh_context(self.mesh):
            cache = read_beginnings(self.model, self.params, batch)
        self.beginnings = batch._replace(images=None), cache
        rests = [
            (number, writing.prompt_ids[run.shared :], writing)
            for number, run in enumerate(runs)
            for writing in run.writings
        ]
        self.rests = deque(sorted(rests, key=lambda rest: -len(rest[1])))

    def fill(self) -> None:
        """Reads rests of prompts into free rows, while there are both."""
        while self.rests and self.free:
            batch, cache = self.beginnings
            # Each of the rests gets a copy of its beginning.
            slots = batch.tokens.shape[1] + bucket(len(self.rests[0][1]))
            most = max(1, MOST_TOKENS // slots)
            count = self._power(2, min(len(self.rests), len(self.free), most))
            of, rests, group = zip(*(self.rests.popleft() for _ in range(count)), strict=True)
            of = [*of, *[0] * (self._whole_shards(count) - count)]
            shared = Shared(batch, cache, jnp.array(of, jnp.int32))
            self._admit(group, rests, [None] * count, shared)
        if not self.rests:
            self.beginnings = None

    def _admit(
        self,
        group: Sequence[Writing],
        ids: Sequence[list[int]],
        images: Sequence[np.ndarray | None],
        shared: Shared | None = None,
    ) -> None:
        """Begins answers after `ids`, of which the first ones are the longest."""
        at = self.free[: len(group)]
        for row, writing in zip(at, group, strict=True):
            self.writing[row] = writing
        batch = self._batch(ids, images)
        fill = len(batch.tokens) - len(group)
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

    def _power(self, base: int, count: int) -> int:
        """A number rounded down to a power of `base` for each shard, if it is not less than one."""
        whole, power = count // self.shards, 1
        while power * base <= whole:
            power *= base
        return self.shards * power if whole else count

    def _whole_shards(self, count: int) -> int:
        """A number rounded up, as every batch shard needs the same number of prompts."""
        return count + -count % self.shards

    def _batch(self, ids: Sequence[list[int]], images: Sequence[np.ndarray | None]) -> Batch:
        """The tokens and images as rows, filled up with the first one."""
        fill = self._whole_shards(len(ids)) - len(ids)
        batch = prompt_batch([*ids, *ids[:1] * fill], [*images, *images[:1] * fill], self.pad_id)
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
