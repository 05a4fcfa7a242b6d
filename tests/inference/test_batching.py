"""Sharded decoding, and batches sized from the memory of the key/value cache."""

import functools

import jax
import jax.numpy as jnp
import pytest

from moddistill.config import ExpertConfig, MeshConfig
from moddistill.convert.resolve import load
from moddistill.distributed.sharding import make_mesh
from moddistill.inference import batching
from moddistill.inference.answer import Decoding
from moddistill.inference.batching import (
    batch_rows,
    bytes_per_row,
    cache_bytes_per_row,
    fitting_rows,
    memory_budget,
)
from moddistill.inference.decode import empty_rows
from moddistill.inference.generation import answer
from moddistill.inference.placement import mesh_context, params_mesh
from moddistill.inference.sampling import Sampling
from moddistill.models.compute import ComputeConfig
from moddistill.models.presets import preset

GREEDY = Decoding(max_new_tokens=5)
FLOAT32, BFLOAT16 = ComputeConfig(), ComputeConfig(dtype=jnp.bfloat16)
MESHES = {
    "data=8": MeshConfig(data=8),
    "fsdp=8": MeshConfig(data=1, fsdp=8),
    "all four axes": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "data=2, tensor=2 of 4": MeshConfig(data=2, tensor=2),
}


def ids(*args):
    return [item.token_ids for item in answer(*args, GREEDY)]


@pytest.fixture(scope="module")
def expected(tiny_models, prompts, tokenizer):
    """Tokens of each model's answers to each prompt by itself, on one device."""

    @functools.cache
    def answers(name):
        model = load(tiny_models[name])
        found = [ids(*model, tokenizer, [prompt])[0] for prompt in prompts]
        assert len(set(map(tuple, found))) > 3
        return found

    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize("mesh", MESHES)
def test_answers_are_the_same_on_every_mesh(tiny_models, prompts, tokenizer, expected, name, mesh):
    sizes = MESHES[mesh]
    devices = jax.devices()[:4] if "of 4" in mesh else None
    model, params = load(tiny_models[name], mesh=make_mesh(sizes, devices))
    kernel = params["decoder"]["segment_0"]["block_0"]["attention"]["query"]["kernel"]
    [part, *_] = kernel.addressable_shards
    assert part.data.size == kernel.size // (sizes.fsdp * sizes.expert * sizes.tensor)
    assert ids(model, params, tokenizer, prompts) == expected(name)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
def test_answers_do_not_depend_on_the_number_of_rows(
    tiny_models, prompts, tokenizer, expected, monkeypatch, rows
):
    """Rows are refilled on a mesh too, whose shards get the same number of prompts."""
    monkeypatch.setattr(batching, "MAX_ROWS", rows)
    loaded = load(tiny_models["dense"], mesh=make_mesh(MeshConfig(data=4, tensor=2)), stacked=False)
    assert ids(*loaded, tokenizer, prompts) == expected("dense")


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=1, fsdp=8)])
def test_the_cache_is_sharded_over_the_devices(tiny_models, mesh):
    """Each of eight devices has the slots of one of eight rows."""
    model, _ = load(tiny_models["dense"], mesh=make_mesh(mesh))
    with mesh_context(make_mesh(mesh)):
        rows = empty_rows(model, 8, 2000, Sampling())
    for x in jax.tree.leaves(rows.cache.layers):
        assert {part.data.shape[1] for part in x.addressable_shards} == {1}


def test_cache_bytes_of_the_papers_student_by_hand():
    """Keys and values of 24 layers with 16 heads of 128: 64 GB for 256 rows in float32."""
    decoder = preset("qwen1.5-1.8b").decoder
    slots = 640
    assert cache_bytes_per_row(decoder, FLOAT32, slots) == 2 * 24 * slots * 16 * 128 * 4
    assert cache_bytes_per_row(decoder, BFLOAT16, slots) == 2 * 24 * slots * 16 * 128 * 2
    assert 256 * cache_bytes_per_row(decoder, FLOAT32, slots) == 64_424_509_440


def test_bytes_of_a_row_are_two_caches_and_the_activations_of_one_layer(tiny_architecture):
    decoder = preset("qwen1.5-1.8b").decoder
    cache = cache_bytes_per_row(decoder, FLOAT32, 656)
    activations = 656 * (8 * 2048 + 3 * 5504) * 4
    assert bytes_per_row(decoder, FLOAT32, 656) == 2 * cache + activations
    dense = tiny_architecture("tiny").decoder
    sparse = tiny_architecture("tiny", ExpertConfig(top_k=2)).decoder
    more = 7 * 3 * dense.intermediate_size * 4  # a second expert at seven positions
    assert bytes_per_row(sparse, FLOAT32, 7) - bytes_per_row(dense, FLOAT32, 7) == more


@pytest.mark.parametrize(
    ("row_bytes", "budget", "shards", "prompts", "rows"),
    [
        (10, 100, 1, 1000, 10),  # as many as the budget holds
        (10, 109, 4, 1000, 40),  # on each of four shards
        (10, 100, 4, 5, 8),  # no more than the prompts, as a multiple of the shards
        (1, 10**9, 1, 1000, 256),  # at most MAX_ROWS
        (1, 10**9, 3, 1000, 255),
        (200, 100, 2, 1000, 2),  # at least one row on each shard
        (1, 10**9, 512, 1000, 512),
    ],
)
def test_rows_are_the_largest_multiple_of_the_shards_that_fits(
    row_bytes, budget, shards, prompts, rows
):
    assert fitting_rows(row_bytes, budget, shards, prompts) == rows


def test_the_budget_is_a_share_of_the_free_memory():
    assert memory_budget({"bytes_limit": 10_000, "bytes_in_use": 4_000}) == 4_800
    assert memory_budget(None) == int(batching.CPU_BYTES // 8 * 0.8)


def test_rows_follow_length_dtype_and_tensor_parallelism(tiny_models, monkeypatch):
    decoder = load(tiny_models["dense"])[0].config.decoder
    row = bytes_per_row(decoder, FLOAT32, 48)
    monkeypatch.setattr(batching, "memory_budget", lambda stats: 10 * row)

    def rows(dtype=jnp.float32, mesh=None, slots=48):
        model = load(tiny_models["dense"], dtype=dtype, mesh=mesh and make_mesh(mesh))
        return batch_rows(*model, slots, 1000)

    assert rows() == 10
    assert rows(jnp.bfloat16) == 20
    assert rows(slots=96) == 5
    assert rows(mesh=MeshConfig(data=4, tensor=2)) == 4 * 10 * 2
    assert rows(mesh=MeshConfig(data=8)) == 8 * 10


@pytest.mark.slow
def test_bfloat16_keeps_routers_and_norms_in_float32(tiny_models, prompts, tokenizer):
    model, params = load(tiny_models["sparse"], dtype=jnp.bfloat16)
    assert params_mesh(params) is None
    kept = {
        path[-1].key
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.dtype == jnp.float32
    }
    assert kept == {"router", "scale"}
    assert all(len(found) <= 5 for found in ids(model, params, tokenizer, prompts))


def test_a_mesh_that_does_not_divide_the_model_is_an_error(tiny_models):
    with pytest.raises(ValueError, match=r"^config\.mesh\.tensor: expected a divisor of 2"):
        load(tiny_models["dense"], mesh=make_mesh(MeshConfig(tensor=8)))
