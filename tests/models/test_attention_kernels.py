"""All kernels compute the same attention, each where its device and shapes allow it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from moddistill.config import MeshConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.models import attention_kernels
from moddistill.models.attention_kernels import (
    Structure,
    attend,
    causal,
    kernel_name,
    visible,
)
from tests.models import draw

ONE = [[1] * 100 + [0] * 28, [1] * 128]
PACKED = [[1] * 50 + [2] * 60 + [0] * 18, [1] * 3 + [2] * 125]
H100 = "NVIDIA H100 80GB HBM3"
GAPS = [[0] * 5 + [2] * 40 + [0] * 20 + [4] * 63, [1] * 3 + [0] * 30 + [3] * 90 + [0] * 5]


def arrays(rows=2, length=128, heads=4, kv_heads=2, head_dim=8):
    sizes = {"query": heads, "key": kv_heads, "value": kv_heads}
    return [draw.normal(rows, length, n, head_dim, seed=i) for i, n in enumerate(sizes.values())]


def plain(query, key, value, segments):
    """From the whole matrix of scores."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) / np.sqrt(query.shape[-1])
    mask = visible(segments, jnp.arange(segments.shape[1])[None], segments)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


def check(compute, inputs, segments):
    """Values and gradients of `compute` at real positions are those of `plain`."""
    segments = jnp.asarray(segments, jnp.int32)
    real = (segments > 0)[:, :, None, None]

    def both(function, *last):
        def loss(*inputs):
            mixed = function(*inputs, *last)
            return jnp.sum(jnp.where(real, mixed, 0) ** 2), mixed

        run = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, mixed), gradients = jax.jit(run)(*inputs)
        assert bool(jnp.all(jnp.isfinite(mixed)))
        return jnp.where(real, mixed, 0), gradients

    found, expected = both(compute), both(plain, segments)
    chex.assert_trees_all_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 12, 128])
@pytest.mark.parametrize(("block", "part"), [(48, 128), (48, 20), (8, 20)])
@pytest.mark.parametrize("segments", [ONE, PACKED, GAPS], ids=["one segment", "packed", "gaps"])
def test_blocks_equal_the_matrix_of_all_scores(monkeypatch, segments, block, part, length):
    """Also where the last block or part is not full."""
    monkeypatch.setattr(attention_kernels, "_BLOCK", block)
    monkeypatch.setattr(attention_kernels, "_PART", part)
    segments = jnp.asarray(segments, jnp.int32)[:, :length]
    check(lambda *x: attend(*x, causal(segments)), arrays(length=length), segments)


@pytest.mark.parametrize("segments", [ONE, PACKED, GAPS], ids=["one segment", "packed", "gaps"])
def test_splash_attention_equals_the_matrix_of_all_scores(segments):
    segments = jnp.asarray(segments, jnp.int32)
    splash = functools.partial(attention_kernels._by_splash, interpret=True)
    check(lambda *x: splash(*x, causal(segments)), arrays(), segments)


@pytest.fixture
def on_any_device(monkeypatch):
    """cuDNN's interface with XLA's computation; records the lengths of queries and keys."""
    xla, lengths = jax.nn.dot_product_attention, []

    def anywhere(query, key, value, *, implementation, **options):
        assert implementation == "cudnn"
        lengths.extend(x.shape[1] for x in (query, key))
        return xla(query, key, value, **options)

    real = attention_kernels.kernel_name
    monkeypatch.setattr(attention_kernels, "device_kind", lambda: H100)

    def in_half_precision(query, key, structure):
        return real(*(jax.ShapeDtypeStruct(x.shape, "bfloat16") for x in (query, key)), structure)

    monkeypatch.setattr(attention_kernels, "kernel_name", in_half_precision)
    monkeypatch.setattr(jax.nn, "dot_product_attention", anywhere)
    return lengths


@pytest.mark.parametrize("length", [127, 128])
def test_lengths_of_rows_equal_their_segments(on_any_device, length):
    segments = jnp.asarray(ONE, jnp.int32)[:, :length]
    check(lambda *x: attend(*x, causal(segments, True)), arrays(length=length), segments)
    assert set(on_any_device) == {128}


@pytest.mark.parametrize("length", [127, 128])
@pytest.mark.parametrize("segments", [PACKED, GAPS], ids=["packed", "gaps"])
def test_dense_masks_equal_the_matrix_of_all_scores(on_any_device, segments, length):
    segments = jnp.asarray(segments, jnp.int32)[:, :length]
    check(lambda *x: attend(*x, causal(segments)), arrays(length=length), segments)
    assert set(on_any_device) == {128}


@pytest.mark.parametrize("slots", [127, 128])
def test_a_prompt_sees_the_filled_slots_of_a_cache(on_any_device, slots):
    """Queries 20 to 30 of two rows."""
    query, key, value = arrays(length=slots)
    segments = jnp.asarray(ONE, jnp.int32)[:, :slots]
    structure = Structure(segments[:, 20:31], segments, jnp.int32(20))
    found = attend(query[:, 20:31], key, value, structure)
    assert on_any_device == [12, 128]
    chex.assert_trees_all_close(found, plain(query, key, value, segments)[:, 20:31], atol=1e-6)


def test_an_empty_row_stays_finite(on_any_device):
    segments = [[0] * 12, [1] * 12]
    structure = causal(jnp.asarray(segments, jnp.int32), True)
    check(lambda *x: attend(*x, structure), arrays(length=12), segments)


def test_the_position_that_makes_a_length_even_changes_nothing(on_any_device):
    inputs = arrays(length=7, heads=3, kv_heads=3)

    def loss(function):
        return jax.value_and_grad(lambda *x: jnp.sum(function(*x) ** 2), argnums=(0, 1, 2))(*inputs)

    filled = loss(lambda *x: attend(*x, None))
    every = jnp.full((2, 7), 1)

    def full(query, key, value):
        mask = visible(every, jnp.full((1, 7), 6), every)
        scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) / np.sqrt(8)
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
        return jnp.einsum("BNTS,BSNH->BTNH", weights, value)

    chex.assert_trees_all_close(filled, loss(full), atol=1e-5)
    assert on_any_device == [8, 8]


@pytest.mark.parametrize("rows", [4, 3], ids=["divided", "replicated"])
@pytest.mark.parametrize("segments", [ONE, PACKED], ids=["one segment", "packed"])
def test_kernels_see_the_rows_and_heads_of_their_device(on_any_device, segments, rows):
    one = segments is ONE
    segments = jnp.asarray((segments * 2)[:rows], jnp.int32)[:, :100].at[0, 40:].set(0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        check(lambda *x: attend(*x, causal(segments, one)), arrays(rows, 100), segments)
    assert on_any_device


@pytest.mark.parametrize(
    ("device", "shape", "dtype", "structure", "expected"),
    [
        (H100, (2, 12, 4, 64), "bfloat16", "one", "cudnn"),
        (H100, (2, 577, 4, 64), "bfloat16", "one", "cudnn"),
        (H100, (2, 12, 4, 64), "bfloat16", "packed", "cudnn mask"),
        (H100, (2, 577, 4, 64), "bfloat16", "packed", "cudnn mask"),
        (H100, (2, 8194, 4, 64), "bfloat16", "packed", "blocks"),
        (H100, (2, 8194, 4, 64), "bfloat16", "one", "cudnn"),
        (H100, (2, 12, 4, 64), "float32", "packed", "blocks"),
        (H100, (2, 576, 4, 64), "bfloat16", None, "cudnn"),
        (H100, (2, 577, 4, 64), "bfloat16", None, "cudnn"),  # CLIP with its class token
        (H100, (2, 12, 4, 64), "float32", "one", "blocks"),
        (H100, (2, 12, 4, 20), "bfloat16", "one", "blocks"),
        (H100, (2, 12, 4, 256), "bfloat16", "one", "blocks"),
        ("TPU v5e", (2, 2048, 4, 64), "bfloat16", "one", "splash"),
        ("TPU v5e", (2, 128, 4, 64), "float32", "packed", "splash"),
        ("TPU v5e", (2, 100, 4, 64), "bfloat16", "one", "blocks"),
        ("TPU v5e", (2, 576, 4, 64), "bfloat16", None, "blocks"),
        ("cpu", (2, 2048, 4, 64), "bfloat16", "one", "blocks"),
    ],
)
def test_kernel_is_chosen_by_device_and_shapes(
    monkeypatch, device, shape, dtype, structure, expected
):
    """For NVIDIA also lowered for CUDA, which is all that can be seen without a GPU."""
    monkeypatch.setattr(attention_kernels, "device_kind", lambda: device)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    query = jax.ShapeDtypeStruct(shape, dtype)
    if structure is not None:
        structure = causal(jnp.ones(shape[:2], jnp.int32), structure == "one")
    assert kernel_name(query, query, structure) == expected
    if not device.startswith("NVIDIA"):
        return

    def loss(query):
        return jnp.sum(attend(query, query, query, structure).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss)).trace(query).lower(lowering_platforms=("cuda",))
    assert ("__cudnn$fmha" in lowered.as_text()) == expected.startswith("cudnn")


@pytest.mark.parametrize(("queries", "expected"), [(1, "blocks"), (128, "cudnn mask")])
def test_kernel_of_a_cache(monkeypatch, queries, expected):
    """One query at a time is too little for cuDNN."""
    monkeypatch.setattr(attention_kernels, "device_kind", lambda: H100)
    query, key = (jax.ShapeDtypeStruct((2, n, 4, 64), jnp.bfloat16) for n in (queries, 256))
    structure = causal(jnp.ones((2, queries), jnp.int32))
    assert kernel_name(query, key, structure) == expected
