import functools
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.config import MeshConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.models.moe.expert_parallel import mix_experts, mix_on_one_device
from tests.models import draw

TOKENS, WIDTH, MLP = 48, 6, 8
MESHES = {
    "2x1x4x1": MeshConfig(data=2, expert=4),
    "1x2x2x2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "8x1x1x1": MeshConfig(),
}


def inputs(top_k, kept, num_experts=4):
    """Tokens, weights and kernels; choices; one expert is chosen far more often than the others."""
    rng = np.random.default_rng(1)
    liked = rng.random((TOKENS, num_experts)) + np.array([1.5] + [0.0] * (num_experts - 1))
    chosen = jnp.asarray(np.argsort(-liked, axis=1)[:, :top_k], jnp.int32)
    kernels = {
        "gate": draw.normal(num_experts, WIDTH, MLP, seed=2) / 2,
        "up": draw.normal(num_experts, WIDTH, MLP, seed=3) / 2,
        "down": draw.normal(num_experts, MLP, WIDTH, seed=4) / 3,
    }
    trained = (draw.normal(TOKENS, WIDTH), jnp.abs(draw.normal(TOKENS, top_k, seed=5)), kernels)
    return trained, chosen, jnp.asarray(rng.random((TOKENS, top_k)) < kept)


def output_and_gradients(mix, trained, chosen, keep):
    outer = draw.normal(TOKENS, WIDTH, seed=6)

    def weighted(tokens, weights, kernels):
        output = mix(tokens, weights, chosen, keep, kernels)
        return jnp.sum(output * outer), output

    grad = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))
    (_, output), gradients = grad(*trained)
    return jax.tree.map(np.asarray, (output, gradients))


def exchange_as_documented(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """`ragged_all_to_all` by gathering the operands of all devices, since CPUs lack it."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    operands, starts, sizes, offsets = map(
        gather, (operand, input_offsets, send_sizes, output_offsets)
    )
    my_index = jax.lax.axis_index(axis_name)
    row = jnp.arange(len(output))
    for sender in range(len(operands)):
        offset = row - offsets[sender, my_index]
        source = jnp.clip(starts[sender, my_index] + offset, 0, len(operand) - 1)
        size = jnp.minimum(sizes[sender, my_index], recv_sizes[sender])
        is_received = (offset >= 0) & (offset < size)
        is_received = is_received.reshape(-1, *[1] * (output.ndim - 1))
        output = jnp.where(is_received, operands[sender][source], output)
    return output


@pytest.mark.parametrize(
    ("mesh", "top_k", "kept"),
    [("2x1x4x1", 2, 1.0), ("2x1x4x1", 3, 0.7), ("1x2x2x2", 2, 0.7), ("8x1x1x1", 1, 1.0)],
)
@pytest.mark.parametrize("transport", ["all_gather", "all_to_all", "ragged"])
def test_transports_give_what_one_device_gives(monkeypatch, transport, mesh, top_k, kept):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", exchange_as_documented)
    trained, chosen, keep = inputs(top_k, kept)
    expected = output_and_gradients(mix_on_one_device, trained, chosen, keep)
    mix = functools.partial(mix_experts, transport=transport)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        got = output_and_gradients(mix, trained, chosen, keep)
    chex.assert_trees_all_close(got, expected, atol=1e-5, rtol=1e-5)


def test_only_rows_of_remote_experts_are_sent(monkeypatch):
    """Twice four devices of six tokens, all for the expert of the first."""
    sent = []

    def spy(operand, output, *, axis_name, **arguments):
        my_index, sizes = jax.lax.axis_index(axis_name), arguments["send_sizes"]
        jax.debug.callback(lambda i, x: sent.append((int(i), *x.tolist())), my_index, sizes)
        return exchange_as_documented(operand, output, axis_name=axis_name, **arguments)

    monkeypatch.setattr(jax.lax, "ragged_all_to_all", spy)
    trained, _, _ = inputs(1, 1.0)
    chosen = jnp.zeros((TOKENS, 1), jnp.int32)
    with jax.set_mesh(make_mesh(MESHES["2x1x4x1"])):
        mix = jax.jit(functools.partial(mix_experts, transport="ragged"))
        keep = jnp.ones((TOKENS, 1), bool)
        jax.block_until_ready(mix(*trained[:2], chosen, keep, trained[2]))
    jax.effects_barrier()
    dispatched = {(i, 6, 0, 0, 0): 2 * 4 for i in range(4)}  # tokens, weights, chosen, keep
    combined = {(0, 6, 6, 6, 6): 2} | {(i, 0, 0, 0, 0): 2 for i in range(1, 4)}
    assert Counter(sent) == dispatched | combined
