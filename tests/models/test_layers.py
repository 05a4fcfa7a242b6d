import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.models.layers import (
    LayerNorm,
    Linear,
    RMSNorm,
    SwiGLU,
    exact_gelu,
    quick_gelu,
    rotary,
    tanh_gelu,
)
from tests.models import draw

SHAPES = [(6,), (3, 6), (2, 3, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_divides_by_the_root_mean_square(shape):
    x = 3 + draw.normal(*shape)
    params = draw.params(RMSNorm(0.1), x)
    output = RMSNorm(0.1).apply({"params": params}, x)
    x, scale = np.asarray(x), np.asarray(params["scale"])
    expected = scale * x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 0.1)
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_subtracts_the_mean_and_divides_by_the_deviation(shape):
    x = 3 + draw.normal(*shape)
    params = draw.params(LayerNorm(0.1), x)
    output = LayerNorm(0.1).apply({"params": params}, x)
    x, scale, bias = np.asarray(x), np.asarray(params["scale"]), np.asarray(params["bias"])
    centred = x - np.mean(x, -1, keepdims=True)
    expected = scale * centred / np.sqrt(np.var(x, -1, keepdims=True) + 0.1) + bias
    np.testing.assert_allclose(output, expected, atol=1e-5)


@pytest.mark.parametrize("norm", [RMSNorm(1e-6), LayerNorm(1e-6)], ids=["rms", "layer"])
def test_norms_compute_in_float32_and_keep_the_dtype(norm):
    x = (300 + draw.normal(2, 64)).astype(jnp.bfloat16)  # squares and means need the precision
    params = draw.params(norm, x)
    expected = norm.apply({"params": params}, x.astype(jnp.float32))
    output = norm.apply({"params": params}, x)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_array_equal(output, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rotary_turns_the_halves_of_a_head_as_complex_numbers(theta):
    x = draw.normal(2, 5, 3, 8)
    positions = jnp.array([[0, 1, 2, 3, 4], [0, 7, 500, 0, 2047]], jnp.int32)
    pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    angles = np.asarray(positions)[..., None, None] * theta ** (-np.arange(4) / 4)
    turned = pairs * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    # float32 angles of 2047 radians are good to 1e-4; the small positions to 1e-5.
    output = np.asarray(jax.jit(rotary, static_argnums=2)(x, positions, theta))
    small = np.asarray(positions) < 100
    np.testing.assert_allclose(output[small], expected[small], atol=1e-5)
    np.testing.assert_allclose(output, expected, atol=1e-3)


def test_rotary_preserves_position_zero_and_norms():
    x = draw.normal(1, 4, 2, 6)
    positions = jnp.array([[0, 3, 9, 27]], jnp.int32)
    output = rotary(x, positions, 1e4)
    np.testing.assert_array_equal(output[:, 0], x[:, 0])
    np.testing.assert_allclose(
        jnp.linalg.norm(output, axis=-1), jnp.linalg.norm(x, axis=-1), atol=1e-5
    )
    assert rotary(x.astype(jnp.bfloat16), positions, 1e4).dtype == jnp.bfloat16


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "features", "formula"),
    [
        ((5, 6), (4,), "BD,DF->BF"),
        ((2, 5, 6), (3, 4), "BTD,DNH->BTNH"),
        ((2, 5, 3, 4), (6,), "BTNH,NHD->BTD"),
    ],
)
def test_linear_contracts_its_inputs_and_adds_its_bias(shape, features, formula, use_bias):
    inputs = ("a", "b") if len(shape) == 4 else ("a",)
    outputs = ("c", "d")[: len(features)]
    linear = Linear(
        features=features, inputs=inputs, outputs=outputs, use_bias=use_bias, dtype=jnp.float32
    )
    x = draw.normal(*shape)
    params = draw.params(linear, x)
    expected = np.einsum(formula, np.asarray(x), np.asarray(params["kernel"]))
    if use_bias:
        expected = expected + np.asarray(params["bias"])
    np.testing.assert_allclose(linear.apply({"params": params}, x), expected, atol=1e-5)
    assert ("bias" in params) == use_bias


def test_parameters_start_with_the_variance_of_their_fan_in():
    linear = Linear(
        features=(40, 10),
        inputs=("embed",),
        outputs=("heads", "head_dim"),
        use_bias=True,
        dtype=jnp.float32,
    )
    params = jax.jit(linear.init)(jax.random.key(0), jnp.ones((1, 100)))["params"]
    kernel, bias = params["kernel"].value, params["bias"].value
    np.testing.assert_allclose(kernel.std(), 0.1, rtol=0.02)
    assert np.all(bias == 0)
    assert params["kernel"].names == ("embed", "heads", "head_dim")


def test_swiglu_gates_by_the_sigmoid_linear_unit():
    x = draw.normal(2, 3, 6)
    params = draw.params(SwiGLU(10, jnp.float32), x)
    gate, up, down = (
        np.asarray(params[name]["kernel"], np.float64) for name in ("gate", "up", "down")
    )
    a = np.asarray(x) @ gate
    expected = (a / (1 + np.exp(-a)) * (np.asarray(x) @ up)) @ down
    output = SwiGLU(10, jnp.float32).apply({"params": params}, x)
    np.testing.assert_allclose(output, expected, atol=1e-5)


POINTS = [-3.0, -1.0, 0.0, 0.5, 2.0]


def test_gelus_are_a_sigmoid_the_normal_distribution_and_its_tanh_approximation():
    x = jnp.array(POINTS)
    quick = [p / (1 + math.exp(-1.702 * p)) for p in POINTS]
    exact = [p * (1 + math.erf(p / math.sqrt(2))) / 2 for p in POINTS]
    scale = math.sqrt(2 / math.pi)
    tanh = [p * (1 + math.tanh(scale * (p + 0.044715 * p**3))) / 2 for p in POINTS]
    np.testing.assert_allclose(quick_gelu(x), quick, atol=1e-6)
    np.testing.assert_allclose(exact_gelu(x), exact, atol=1e-6)
    np.testing.assert_allclose(tanh_gelu(x), tanh, atol=1e-6)
    assert np.abs(exact_gelu(x) - tanh_gelu(x)).max() > 1e-4
