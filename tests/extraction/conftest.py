"""Caches of the tiny experiments."""

import pytest

from moddistill.config import CacheConfig
from moddistill.extraction import plan
from moddistill.extraction.run import extract
from moddistill.models.vocabulary import num_ids
from moddistill.teachers import cache as caches


@pytest.fixture(scope="module")
def small_shards():
    """Shards of three records, so that a few records have several."""
    patch = pytest.MonkeyPatch()
    for module in (caches, plan):
        patch.setattr(module, "SHARD_RECORDS", 3)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def cached(tiny_config, tokenizer, tmp_path_factory, small_shards):
    """`cached(stage, wanted, **changes)`: the folder of a cache, made once."""
    made = {}

    def make(stage, wanted=None, **changes):
        wanted = wanted or CacheConfig("top_k", num_ids(tokenizer.real_ids))
        key = repr((stage, wanted, changes))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("cache") / stage
            extract(tiny_config(stage, **changes), wanted, made[key])
        return made[key]

    return make
