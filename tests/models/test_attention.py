import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from moddistill.models import attention as module
from moddistill.models.attention import Attention, causal_mask
from tests.models import draw

WIDTH = 12


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([1, 1, 1], ["x..", "xx.", "xxx"]),
        ([1, 1, 0, 0], ["x...", "xx..", "..x.", "...x"]),
        ([0, 0, 1, 1], ["x...", ".x..", "..x.", "..xx"]),
        ([1, 1, 2, 2, 0], ["x....", "xx...", "..x..", "..xx.", "....x"]),
        ([0, 0], ["x.", ".x"]),
    ],
    ids=str,
)
def test_positions_see_what_is_behind_them_in_their_segment_and_padding_itself(segments, expected):
    mask = causal_mask(jnp.array([segments], jnp.int32))[0]
    assert ["".join(".x"[int(seen)] for seen in row) for row in mask] == expected


def attention(heads, kv_heads, theta=None):
    module = Attention(heads, kv_heads, 4, theta, True, jnp.float32)
    hidden = draw.normal(1, 2, WIDTH)
    return module, draw.params(module, hidden, None, jnp.zeros((1, 2), jnp.int32))


def places(rows, length):
    return jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (7, 1), (6, 2)])
def test_a_group_of_query_heads_shares_the_keys_and_values_of_one_head(heads, kv_heads):
    module, params = attention(heads, kv_heads)
    hidden = draw.normal(2, 5, WIDTH)
    mask = causal_mask(jnp.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 0]], jnp.int32))
    output, cache = draw.apply(module, params, hidden, mask)

    def project(name):
        kernel, bias = (np.asarray(params[name][x], np.float64) for x in ("kernel", "bias"))
        return np.einsum("BTD,DNH->BTNH", hidden, kernel) + bias

    query, key, value = project("query"), project("key"), project("value")
    mixed = np.zeros_like(query)
    for b, t, n in np.ndindex(query.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        group = n // (heads // kv_heads)
        scores = np.exp(key[b, seen, group] @ query[b, t, n] / np.sqrt(4))
        mixed[b, t, n] = scores / scores.sum() @ value[b, seen, group]
    expected = np.einsum("BTNH,NHD->BTD", mixed, params["out"]["kernel"])
    expected += np.asarray(params["out"]["bias"])
    np.testing.assert_allclose(output, expected, atol=1e-5)
    assert cache is None


def test_without_a_mask_every_position_sees_every_other():
    module, params = attention(2, 2)
    hidden = draw.normal(1, 4, WIDTH)
    everything, _ = draw.apply(module, params, hidden, jnp.ones((1, 4, 4), bool))
    np.testing.assert_allclose(draw.apply(module, params, hidden)[0], everything, atol=1e-6)


def test_attention_depends_on_distances_alone():
    module, params = attention(4, 2, theta=100.0)
    hidden, mask = draw.normal(1, 5, WIDTH), causal_mask(jnp.ones((1, 5), jnp.int32))
    near, _ = draw.apply(module, params, hidden, mask, places(1, 5))
    far, _ = draw.apply(module, params, hidden, mask, places(1, 5) + 50)
    spread, _ = draw.apply(module, params, hidden, mask, places(1, 5) * 2)
    np.testing.assert_allclose(far, near, atol=1e-5)
    assert np.abs(spread - near).max() > 1e-3


@pytest.mark.parametrize("chunks", [[1] * 6, [4, 1, 1], [2, 4], [6]], ids=str)
def test_decoding_with_a_cache_equals_the_full_forward(chunks):
    module, params = attention(4, 2, theta=100.0)
    hidden, positions = draw.normal(2, 6, WIDTH), places(2, 6)
    full, _ = draw.apply(
        module, params, hidden, causal_mask(jnp.ones((2, 6), jnp.int32)), positions
    )

    slots = 8  # two are never filled, and hold what no one may see
    cache = {name: jnp.full((2, slots, 2, 4), 1e3) for name in ("key", "value")}
    outputs, start = [], 0
    for chunk in chunks:
        now = slice(start, start + chunk)
        mask = jnp.arange(slots)[None, None] <= positions[:, now, None]
        output, cache = draw.apply(
            module, params, hidden[:, now], mask, positions[:, now], cache, jnp.int32(start)
        )
        outputs.append(output)
        start += chunk
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-5)
    assert np.all(cache["key"][:, 6:] == 1e3)


def test_a_cache_keeps_its_dtype():
    module, params = attention(2, 2)
    cache = {name: jnp.zeros((1, 3, 2, 4), jnp.bfloat16) for name in ("key", "value")}
    mask = jnp.ones((1, 1, 3), bool)
    module = Attention(2, 2, 4, None, True, jnp.bfloat16)
    hidden = draw.normal(1, 1, WIDTH).astype(jnp.bfloat16)
    _, cache = draw.apply(module, params, hidden, mask, places(1, 1), cache, jnp.int32(0))
    assert {x.dtype for x in cache.values()} == {jnp.dtype(jnp.bfloat16)}


def normed_attention(heads, kv_heads, eps):
    module = Attention(heads, kv_heads, 4, 100.0, False, jnp.float32, False, eps)
    return module, (draw.normal(1, 2, WIDTH), None, jnp.zeros((1, 2), jnp.int32))


def test_norms_of_query_and_key_are_shared_by_heads_and_take_the_place_of_biases():
    module, inputs = normed_attention(4, 2, 1e-6)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    assert {name: set(leaves) for name, leaves in params.items()} == {
        "query": {"kernel"}, "key": {"kernel"}, "value": {"kernel"}, "out": {"kernel"},
        "query_norm": {"scale"}, "key_norm": {"scale"},
    }  # fmt: skip
    for name in ("query_norm", "key_norm"):
        assert params[name]["scale"].names == ("head_dim",)
        assert params[name]["scale"].value.shape == (4,)


def test_normed_heads_have_their_own_length_forgotten():
    module, inputs = normed_attention(4, 2, 1e-12)
    hidden, _, positions = inputs
    mask = causal_mask(jnp.ones((1, 2), jnp.int32))
    params = draw.params(module, *inputs)
    expected, _ = draw.apply(module, params, hidden, mask, positions)
    for name, factors in (("query", [1, 2, 3, 4]), ("key", [5, 6])):
        factor = jnp.asarray(factors, jnp.float32)[None, :, None]
        params[name]["kernel"] = params[name]["kernel"] * factor
    output, _ = draw.apply(module, params, hidden, mask, positions)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    params["query_norm"]["scale"] = -params["query_norm"]["scale"]
    output, _ = draw.apply(module, params, hidden, mask, positions)
    assert np.abs(output - expected).max() > 1e-2


def test_blocks_of_queries_give_the_same_values_and_gradients(monkeypatch):
    monkeypatch.setattr(module, "_QUERIES", 4)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, 12, 4, 8), (2, 12, 2, 8), (2, 12, 2, 8)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    segments = jnp.asarray([[1] * 9 + [0] * 3, [1] * 5 + [2] * 7])
    mask = causal_mask(segments)

    def blocked(*arrays):
        return jnp.sum(module.attend(*arrays, mask) ** 2)

    def whole(*arrays):
        return jnp.sum(jax.nn.dot_product_attention(*arrays, mask=mask[:, None]) ** 2)

    ours = jax.jit(jax.value_and_grad(blocked, argnums=(0, 1, 2)))
    assert "while" in ours.lower(*arrays).as_text()
    expected = jax.value_and_grad(whole, argnums=(0, 1, 2))(*arrays)
    chex.assert_trees_all_close(ours(*arrays), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "masked", "fused"),
    [
        ((2, 12, 4, 64), jnp.bfloat16, True, True),
        ((2, 576, 4, 64), jnp.bfloat16, False, True),
        ((2, 577, 4, 64), jnp.bfloat16, False, True),  # a tower with its class token
        ((2, 577, 4, 64), jnp.bfloat16, True, False),
        ((2, 12, 4, 64), jnp.float32, True, False),
        ((2, 12, 4, 20), jnp.bfloat16, True, False),
        ((2, 12, 4, 256), jnp.bfloat16, True, False),
    ],
)
def test_gpus_attend_with_cudnn_where_it_has_a_kernel(monkeypatch, shape, dtype, masked, fused):
    """Lowered for CUDA as in a process with its GPUs, which is all that can be seen without one."""
    monkeypatch.setattr(module, "device_kind", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    query = jax.ShapeDtypeStruct(shape, dtype)
    mask = causal_mask(jnp.ones(shape[:2], jnp.int32)) if masked else None

    def loss(query):
        return jnp.sum(module.attend(query, query, query, mask).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss)).trace(query).lower(lowering_platforms=("cuda",))
    assert ("__cudnn$fmha" in lowered.as_text()) == fused


def test_the_position_that_makes_a_length_even_changes_nothing(monkeypatch):
    plain = jax.nn.dot_product_attention
    lengths = []

    def anywhere(query, *rest, implementation, **options):
        assert implementation == "cudnn"
        lengths.append(query.shape[1])
        return plain(query, *rest, **options)

    monkeypatch.setattr(module, "_cudnn_serves", lambda *_: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", anywhere)
    arrays = [draw.normal(2, 7, 3, 8, seed=seed) for seed in range(3)]

    def loss(function):
        return jax.value_and_grad(lambda *x: jnp.sum(function(*x) ** 2), argnums=(0, 1, 2))(*arrays)

    filled = loss(lambda *x: module.attend(*x, None))
    chex.assert_trees_all_close(filled, loss(plain), atol=1e-5)
    assert lengths == [8]
