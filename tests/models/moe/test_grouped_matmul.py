import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moddistill.distributed.sharding import MESH_AXES
from moddistill.models.moe import grouped_matmul
from moddistill.models.moe.expert_parallel import mix_experts
from tests.models import draw

WIDTH, MLP, BLOCK = 128, 256, 8


def inputs(blocks, unused, dtype=jnp.float32):
    """Random rows in as many blocks as given, and `unused` ones behind them."""
    count, experts = sum(blocks) + unused, len(blocks)
    kernels = {
        "gate": draw.normal(experts, WIDTH, MLP, seed=2) / 11,
        "up": draw.normal(experts, WIDTH, MLP, seed=3) / 11,
        "down": draw.normal(experts, MLP, WIDTH, seed=4) / 16,
    }
    rows = draw.normal(count, BLOCK, WIDTH)
    arrays = (rows, jnp.abs(draw.normal(count, BLOCK, seed=5)), draw.normal(*rows.shape, seed=6))
    cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
    tokens, outer, kernels = cast(arrays[0]), cast(arrays[2]), cast(kernels)
    return tokens, arrays[1], outer, kernels, jnp.asarray(blocks, jnp.int32)


def plain(tokens, kernels, blocks):
    """Each block with the kernels of its expert."""
    expert = jnp.repeat(jnp.arange(len(blocks)), blocks)
    used = tokens[: len(expert)]
    gate = jnp.einsum("GCD,GDF->GCF", used, kernels["gate"][expert])
    up = jnp.einsum("GCD,GDF->GCF", used, kernels["up"][expert])
    return jnp.einsum("GCF,GFD->GCD", nn.silu(gate) * up, kernels["down"][expert]), gate, up


FORMS = {
    "loop": (grouped_matmul.forward_loop, grouped_matmul.backward_loop),
    "kernel": (
        functools.partial(grouped_matmul.forward_kernel, interpret=True),
        functools.partial(grouped_matmul.backward_kernel, interpret=True),
    ),
    "backend": (grouped_matmul.forward, grouped_matmul.backward),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("blocks", "unused"), [((1,), 0), ((7, 0, 2), 3), ((3, 5, 1, 6), 1)])
def test_each_form_is_the_plain_one(form, blocks, unused):
    tokens, scales, outer, kernels, count = inputs(blocks, unused)
    used = sum(blocks)
    forward, backward = FORMS[form]
    output, gate, up = jax.jit(forward)(tokens, kernels, count)
    expected = plain(tokens, kernels, count)
    chex.assert_trees_all_close(
        (output[:used], gate[:used], up[:used]), expected, atol=1e-5, rtol=1e-5
    )

    def weighted(tokens, scales, kernels):
        return jnp.sum(plain(tokens, kernels, count)[0] * (outer * scales[..., None])[:used])

    d_tokens, d_scales, d_kernels = jax.grad(weighted, (0, 1, 2))(tokens, scales, kernels)
    got = jax.jit(backward)(tokens, scales, outer, gate, up, kernels, count)
    chex.assert_trees_all_close(
        (got[0][:used], got[1][:used]), (d_tokens[:used], d_scales[:used]), atol=1e-5, rtol=1e-5
    )
    present = [i for i, n in enumerate(blocks) if n]
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[jnp.asarray(present)], got[2]),
        jax.tree.map(lambda x: x[jnp.asarray(present)], d_kernels),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_without_rows_has_no_gradient(form):
    tokens, scales, outer, kernels, count = inputs((0, 2, 0), 1)
    forward, backward = FORMS[form]
    _, gate, up = forward(tokens, kernels, count)
    gradients = backward(tokens, scales, outer, gate, up, kernels, count)[2]
    for gradient in gradients.values():
        assert jnp.all(gradient[jnp.asarray([0, 2])] == 0)


@pytest.mark.parametrize("form", ["loop", "kernel"])
def test_low_precision_keeps_weight_gradients_in_float32(form):
    tokens, scales, outer, kernels, count = inputs((3, 2), 0, jnp.bfloat16)
    forward, backward = FORMS[form]
    output, gate, up = forward(tokens, kernels, count)
    assert {x.dtype for x in (output, gate, up)} == {jnp.dtype("bfloat16")}
    d_tokens, d_scales, d_kernels = backward(tokens, scales, outer, gate, up, kernels, count)
    assert d_tokens.dtype == jnp.bfloat16 and d_scales.dtype == jnp.float32
    assert {x.dtype for x in d_kernels.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("size", [896, 1536, 2048, 2816, 4864, 5504, 8960])
def test_tiles_of_the_kernel_compute_little_beyond_a_width(size):
    """Widths of the Qwen students; beside it, blocks add an eighth."""
    assert grouped_matmul.padded(size, grouped_matmul.tile(size, 1024)) <= 1.1 * size


@pytest.mark.parametrize(("size", "most", "expected"), [(896, 1024, 896), (8, 512, 256)])
def test_a_tile_is_the_widest_that_computes_least(size, most, expected):
    assert grouped_matmul.tile(size, most) == expected


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 2, 1)], ids=["one device", "expert mesh"])
@pytest.mark.parametrize(
    ("kind", "platform", "kernel"),
    [
        ("TPU v5 lite", "tpu", True),
        ("TPU7x", "tpu", True),
        ("NVIDIA H100 80GB HBM3", "gpu", False),
        ("cpu", "cpu", False),
    ],
)
def test_only_programs_for_tpus_have_the_kernel(kind, platform, kernel, sizes):
    device = AbstractDevice(kind, 1, platform)
    types = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=types, abstract_device=device)
    shape, half = jax.ShapeDtypeStruct, jnp.bfloat16
    experts = {name: shape((4, WIDTH, MLP), half) for name in ("gate", "up")}
    experts["down"] = shape((4, MLP, WIDTH), half)

    def loss(tokens, weights, experts, chosen, keep):
        return jnp.sum(mix_experts(tokens, weights, chosen, keep, experts).astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(
            shape((64, WIDTH), half),
            shape((64, 2), jnp.float32),
            experts,
            shape((64, 2), jnp.int32),
            shape((64, 2), bool),
        )
    assert ("pallas_call" in str(traced.jaxpr)) == kernel
    assert ("while" in str(traced.jaxpr)) != kernel


_ON_THE_CPU = """
import sys, jax, jax.numpy as jnp
import moddistill.train
from moddistill.models.moe.expert_parallel import mix_experts

experts = {"gate": jnp.ones((2, 4, 8)), "up": jnp.ones((2, 4, 8)), "down": jnp.ones((2, 8, 4))}
chosen, keep = jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1), bool)
total = lambda tokens: jnp.sum(mix_experts(tokens, jnp.ones((3, 1)), chosen, keep, experts))
jax.block_until_ready(jax.jit(jax.value_and_grad(total))(jnp.ones((3, 4))))
print(*[name for name in sys.modules if name.startswith("jax.experimental.pallas")])
"""


def test_training_on_a_cpu_imports_no_kernels_for_tpus():
    command = [sys.executable, "-c", _ON_THE_CPU]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
