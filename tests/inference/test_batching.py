"""Sharded decoding, and batches sized from the memory of the key/value cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from moddistill.config import ExpertConfig, MeshConfig
from moddistill.convert.resolve import load
from moddistill.distributed.sharding import make_mesh
from moddistill.inference import batching
from moddistill.inference.batching import (
    answer_in_batches,
    batch_rows,
    bytes_per_row,
    cache_bytes_per_row,
    fitting_rows,
    memory_budget,
)
from moddistill.inference.decode import answer, decode
from moddistill.inference.placement import mesh_context, params_mesh, put_rows
from moddistill.inference.prompts import Prompt, encode_prompts, padded_length, prompt_batch
from moddistill.inference.sampling import Sampling
from moddistill.models.presets import preset

NEW = 5
MESHES = {
    "data=8": MeshConfig(data=8),
    "fsdp=8": MeshConfig(data=1, fsdp=8),
    "all four axes": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "data=2, tensor=2 of 4": MeshConfig(data=2, tensor=2),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Nine prompts of different lengths with 0, 1 or 2 images."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 28, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    images = [str(folder / f"{i}.png") for i in range(2)]
    questions = ["what is it?", "is it red, green or blue?", "say what colour that is, in one word"]
    return [
        Prompt("<image>\n" * count + question, tuple(images[:count]))
        for question in questions
        for count in range(3)
    ]


@pytest.fixture(scope="module")
def expected(tiny_models, prompts, tokenizer):
    """Each model's answers to each prompt by itself, on one device."""

    @functools.cache
    def answers(name):
        model = load(tiny_models[name])
        single = [
            item
            for prompt in prompts
            for item in answer(*model, tokenizer, [prompt], max_new_tokens=NEW)
        ]
        assert len({tuple(item.token_ids) for item in single}) > 3
        return single

    return answers


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize("mesh", MESHES)
def test_answers_are_the_same_on_every_mesh(tiny_models, prompts, tokenizer, expected, name, mesh):
    sizes = MESHES[mesh]
    devices = jax.devices()[:4] if "of 4" in mesh else None
    model, params = load(tiny_models[name], mesh=make_mesh(sizes, devices))
    kernel = params["decoder"]["segment_0"]["block_0"]["attention"]["query"]["kernel"]
    [part, *_] = kernel.addressable_shards
    assert part.data.size == kernel.size // (sizes.fsdp * sizes.expert * sizes.tensor)
    assert answer(model, params, tokenizer, prompts, max_new_tokens=NEW) == expected(name)


@pytest.mark.parametrize(
    ("rows", "mesh"),
    [
        (1, None),
        (4, None),
        (256, None),
        (4, MeshConfig(data=4, tensor=2)),
        (256, MeshConfig(data=4, tensor=2)),
    ],
)
def test_answers_do_not_depend_on_the_batch_size(
    tiny_models, prompts, tokenizer, expected, monkeypatch, rows, mesh
):
    monkeypatch.setattr(batching, "MAX_ROWS", rows)
    model, params = load(tiny_models["dense"], mesh=mesh and make_mesh(mesh))
    texts = answer_in_batches(model, params, tokenizer, prompts, NEW)
    assert texts == [item.text for item in expected("dense")]


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=1, fsdp=8)])
def test_the_cache_is_sharded_over_the_devices(tiny_models, prompts, tokenizer, mesh):
    """Eight devices with one row each need a fraction of the memory of one device with all."""

    def temporary_bytes(mesh):
        model, params = load(tiny_models["dense"], mesh=mesh)
        rows = put_rows(mesh, prompt_batch(prompts[:8], model.config, tokenizer))
        options = {"max_new_tokens": 2000, "end_id": 2, "sampling": Sampling()}
        with mesh_context(mesh):
            lowered = decode.lower(model, params, rows, jax.random.key(0), **options)
            return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(make_mesh(mesh)) < temporary_bytes(None) / 4


def test_no_prompts_have_no_answers(tiny_models, tokenizer):
    assert answer_in_batches(*load(tiny_models["dense"]), tokenizer, [], NEW) == []


def test_cache_bytes_of_the_papers_student_by_hand():
    """Keys and values of 24 layers with 16 heads of 128: 64 GB for 256 rows in float32."""
    decoder = preset("qwen1.5-1.8b").decoder
    slots = 640
    assert cache_bytes_per_row(decoder, slots, jnp.float32) == 2 * 24 * slots * 16 * 128 * 4
    assert cache_bytes_per_row(decoder, slots, jnp.bfloat16) == 2 * 24 * slots * 16 * 128 * 2
    assert 256 * cache_bytes_per_row(decoder, slots, jnp.float32) == 64_424_509_440


def test_bytes_of_a_row_are_two_caches_and_the_activations_of_one_layer(tiny_architecture):
    decoder = preset("qwen1.5-1.8b").decoder
    cache = cache_bytes_per_row(decoder, 656, jnp.float32)
    activations = 656 * (8 * 2048 + 3 * 5504) * 4
    assert bytes_per_row(decoder, 656, jnp.float32) == 2 * cache + activations
    dense = tiny_architecture("tiny").decoder
    sparse = tiny_architecture("tiny", ExpertConfig(top_k=2)).decoder
    more = 7 * 3 * dense.intermediate_size * 4  # a second expert at seven positions
    assert bytes_per_row(sparse, 7, jnp.float32) - bytes_per_row(dense, 7, jnp.float32) == more


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


def test_rows_follow_length_dtype_and_tensor_parallelism(
    tiny_models, prompts, tokenizer, monkeypatch
):
    config = load(tiny_models["dense"])[0].config
    many = prompts[:1] * 1000
    length = padded_length(encode_prompts(many, config, tokenizer))
    row = bytes_per_row(config.decoder, length + NEW, jnp.float32)
    monkeypatch.setattr(batching, "memory_budget", lambda stats: 10 * row)

    def rows(dtype=jnp.float32, mesh=None, new=NEW):
        model = load(tiny_models["dense"], dtype=dtype, mesh=mesh and make_mesh(mesh))
        return batch_rows(*model, tokenizer, many, new)

    assert rows() == 10
    assert rows(jnp.bfloat16) == 20
    assert rows(new=NEW + length + NEW) == 5
    assert rows(mesh=MeshConfig(data=4, tensor=2)) == 4 * 10 * 2
    assert rows(mesh=MeshConfig(data=8)) == 8 * 10


def test_bfloat16_keeps_routers_and_norms_in_float32(tiny_models, prompts, tokenizer):
    model, params = load(tiny_models["sparse"], dtype=jnp.bfloat16)
    assert params_mesh(params) is None
    kept = {
        path[-1].key
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.dtype == jnp.float32
    }
    assert kept == {"router", "scale"}
    answers = answer(model, params, tokenizer, prompts, max_new_tokens=NEW)
    assert all(len(item.token_ids) <= NEW for item in answers)


def test_a_mesh_that_does_not_divide_the_model_is_an_error(tiny_models):
    with pytest.raises(ValueError, match=r"^config\.mesh\.tensor: expected a divisor of 2"):
        load(tiny_models["dense"], mesh=make_mesh(MeshConfig(tensor=8)))
