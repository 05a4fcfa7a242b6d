"""Sizes of the files of a cache."""

import numpy as np
import pytest

from moddistill.extraction.plan import Shard
from moddistill.extraction.shards import WORK, stored_size, write_shard
from moddistill.teachers.cache import SHARD_RECORDS
from moddistill.teachers.entries import Entry, EntryFormat, TokenTargets


@pytest.mark.parametrize(("ids", "tokens"), [(16, 2), (64, 4), (64, 20), (16, 200)])
def test_a_file_is_as_large_as_forecast(ids, tokens, tmp_path):
    """And at most 4.25 K + 16 bytes a token, of records with at least 4 tokens."""
    format = EntryFormat("top_k", ids, ((0, 151_646),))
    rng = np.random.default_rng(0)
    shape = (tokens, ids)

    def entry():
        labels, chosen = rng.integers(0, 151_646, tokens), rng.integers(0, 151_646, shape)
        logprobs = [-rng.exponential(size=x) for x in (tokens, shape, tokens)]
        return Entry(TokenTargets(logprobs[0], labels, chosen, *logprobs[1:]))

    numbers = np.arange(SHARD_RECORDS)
    shard = Shard(0, "records.array_record", 0, len(numbers), numbers, len(numbers))
    (tmp_path / WORK).mkdir()
    write_shard(tmp_path, shard, {number: entry() for number in range(shard.size)}, format)
    size = (tmp_path / shard.name).stat().st_size / shard.size
    assert size == pytest.approx(stored_size(format.bytes_of(tokens)), rel=0.1)
    assert tokens < 4 or size / tokens <= 4.25 * ids + 16
