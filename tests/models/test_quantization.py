import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moddistill.config import MeshConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.models.batch import padded_batch
from moddistill.models.compute import ComputeConfig
from moddistill.models.quantization import (
    dequantize,
    loading_shapes,
    quantize,
    quantize_all,
    stored_shapes,
)
from moddistill.models.vlm import Vlm
from moddistill.params import flatten
from tests.models import draw


def test_a_value_is_off_by_half_a_step_at_most():
    kernels = draw.normal(3, 40, 7)
    quantized = quantize(kernels, axis=1)
    assert quantized["int8"].dtype == jnp.int8 and quantized["step"].shape == (3, 1, 7)
    np.testing.assert_allclose(
        quantized["step"][:, 0], np.max(np.abs(kernels), axis=1) / 127, rtol=1e-6
    )
    error = np.abs(dequantize(quantized, jnp.float32) - kernels)
    assert np.all(error <= quantized["step"] * 0.5001)


def test_a_line_of_zeros_stays_zero():
    kernels = jnp.zeros((1, 4, 2)).at[0, 0, 0].set(2.0)
    np.testing.assert_array_equal(dequantize(quantize(kernels, 1), jnp.float32), kernels)


@pytest.fixture(scope="module")
def shapes(tiny_architecture, init):
    """Parameters of the tiny teacher and their shapes on a mesh of one axis."""
    params = init(tiny_architecture("tiny-teacher"))
    where = NamedSharding(make_mesh(MeshConfig(fsdp=8, data=1)), PartitionSpec())
    return params, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params
    )


def test_matrices_of_the_layers_are_quantized_and_nothing_else(shapes):
    params, plain = shapes
    kept = stored_shapes(plain, "int8", False)
    quantized = {path.removesuffix("/int8") for path in flatten(kept) if path.endswith("/int8")}
    expected = {
        path
        for path, x in flatten(params).items()
        if path.startswith("decoder/segment") and path.endswith("/kernel")
    }
    assert quantized == expected
    read = loading_shapes(kept, jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(read, plain)
    on_host = {p for p, x in flatten(read).items() if x.sharding.memory_kind == "pinned_host"}
    assert on_host == quantized, "what will be quantized is read into host memory"


def test_matrices_of_layers_go_to_the_host_and_the_rest_stays(shapes):
    params, plain = shapes
    kept = stored_shapes(plain, "none", True)
    placed = flatten(quantize_all(jax.tree.map(jnp.copy, params), kept))
    for path, x in placed.items():
        large = path.startswith("decoder/segment_") and path.endswith("/kernel")
        assert (x.sharding.memory_kind == "pinned_host") == large, path
        np.testing.assert_array_equal(x, flatten(params)[path])


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("quantization", ["int8", "none"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_quantized_model_computes_with_its_dequantized_kernels(
    tiny_architecture, shapes, quantization, offload, remat
):
    params, plain = shapes
    config = tiny_architecture("tiny-teacher")
    kept = quantize_all(jax.tree.map(jnp.copy, params), stored_shapes(plain, quantization, offload))
    dequantized = dequantize(kept, jnp.float32)
    batch = padded_batch(np.arange(12, dtype=np.int32)[None], np.array([12]))
    compute = ComputeConfig(remat=remat, quantized_layers=True)
    got = jax.jit(Vlm(config, compute).apply)({"params": kept}, batch)
    expected = jax.jit(Vlm(config).apply)({"params": dequantized}, batch)
    np.testing.assert_allclose(got.hidden, expected.hidden, atol=1e-5)
    if quantization == "int8":
        exact = jax.jit(Vlm(config).apply)({"params": params}, batch).hidden
        assert np.any(got.hidden != exact)
        np.testing.assert_allclose(got.hidden, exact, atol=0.2)
