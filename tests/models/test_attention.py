import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.models.attention import Attention
from moddistill.models.attention_kernels import Structure, causal, visible
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
def test_positions_see_earlier_ones_of_their_segment_and_padding_sees_itself(segments, expected):
    segments = jnp.array([segments], jnp.int32)
    mask = visible(segments, jnp.arange(segments.shape[1])[None], segments)[0]
    assert ["".join(".x"[int(seen)] for seen in row) for row in mask] == expected


def attention(heads, kv_heads, theta=None):
    module = Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=4,
        rope_theta=theta,
        out_bias=True,
        dtype=jnp.float32,
    )
    hidden = draw.normal(1, 2, WIDTH)
    return module, draw.params(module, hidden, None, jnp.zeros((1, 2), jnp.int32))


def places(rows, length):
    return jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (4, 2), (7, 1), (6, 2)])
def test_a_group_of_query_heads_shares_the_keys_and_values_of_one_head(heads, kv_heads):
    module, params = attention(heads, kv_heads)
    hidden = draw.normal(2, 5, WIDTH)
    segments = jnp.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 0]], jnp.int32)
    output, cache = draw.apply(module, params, hidden, causal(segments))
    mask = visible(segments, jnp.arange(5)[None], segments)

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


def test_without_a_structure_every_position_sees_every_other():
    module, params = attention(2, 2)
    hidden = draw.normal(1, 4, WIDTH)
    all_slots = jnp.ones((1, 4), jnp.int32)
    last = Structure(all_slots, all_slots, jnp.int32(3))  # all queries after all keys
    everything, _ = draw.apply(module, params, hidden, last)
    np.testing.assert_allclose(draw.apply(module, params, hidden)[0], everything, atol=1e-6)


def test_attention_depends_on_relative_positions_only():
    module, params = attention(4, 2, theta=100.0)
    hidden, structure = draw.normal(1, 5, WIDTH), causal(jnp.ones((1, 5), jnp.int32))
    near, _ = draw.apply(module, params, hidden, structure, places(1, 5))
    far, _ = draw.apply(module, params, hidden, structure, places(1, 5) + 50)
    spread, _ = draw.apply(module, params, hidden, structure, places(1, 5) * 2)
    np.testing.assert_allclose(far, near, atol=1e-5)
    assert np.abs(spread - near).max() > 1e-3


@pytest.mark.parametrize("chunks", [[1] * 6, [4, 1, 1], [2, 4], [6]], ids=str)
def test_decoding_with_a_cache_equals_the_full_forward(chunks):
    module, params = attention(4, 2, theta=100.0)
    hidden, positions = draw.normal(2, 6, WIDTH), places(2, 6)
    full, _ = draw.apply(module, params, hidden, causal(jnp.ones((2, 6), jnp.int32)), positions)

    slots = 8  # two are never filled, and must not be seen
    key_segments = jnp.ones((2, slots), jnp.int32)
    cache = {name: jnp.full((2, slots, 2, 4), 1e3) for name in ("key", "value")}
    outputs, start = [], 0
    for chunk in chunks:
        now = slice(start, start + chunk)
        structure = Structure(jnp.ones((2, chunk), jnp.int32), key_segments, jnp.full(2, start))
        output, cache = draw.apply(
            module, params, hidden[:, now], structure, positions[:, now], cache
        )
        outputs.append(output)
        start += chunk
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-5)
    assert np.all(cache["key"][:, 6:] == 1e3)


def test_a_cache_keeps_its_dtype():
    module, params = attention(2, 2)
    cache = {name: jnp.zeros((1, 3, 2, 4), jnp.bfloat16) for name in ("key", "value")}
    structure = Structure(
        jnp.ones((1, 1), jnp.int32), jnp.ones((1, 3), jnp.int32), jnp.zeros(1, jnp.int32)
    )
    module = module.clone(dtype=jnp.bfloat16)
    hidden = draw.normal(1, 1, WIDTH).astype(jnp.bfloat16)
    _, cache = draw.apply(module, params, hidden, structure, places(1, 1), cache)
    assert {x.dtype for x in cache.values()} == {jnp.dtype(jnp.bfloat16)}


def normed_attention(heads, kv_heads, eps):
    module = Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=4,
        rope_theta=100.0,
        qkv_bias=False,
        qk_norm_eps=eps,
        dtype=jnp.float32,
    )
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


def test_normalised_heads_do_not_depend_on_their_scale():
    module, inputs = normed_attention(4, 2, 1e-12)
    hidden, _, positions = inputs
    structure = causal(jnp.ones((1, 2), jnp.int32))
    params = draw.params(module, *inputs)
    expected, _ = draw.apply(module, params, hidden, structure, positions)
    for name, factors in (("query", [1, 2, 3, 4]), ("key", [5, 6])):
        factor = jnp.asarray(factors, jnp.float32)[None, :, None]
        params[name]["kernel"] = params[name]["kernel"] * factor
    output, _ = draw.apply(module, params, hidden, structure, positions)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    params["query_norm"]["scale"] = -params["query_norm"]["scale"]
    output, _ = draw.apply(module, params, hidden, structure, positions)
    assert np.abs(output - expected).max() > 1e-2
