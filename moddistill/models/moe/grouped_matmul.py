"""Grouped matmuls: gated feed-forward layers of several experts, over blocks of rows.

Each block [C, D] belongs to one expert. Blocks are ordered by expert; blocks after the last one in
use belong to no expert, and their results are undefined. `forward` and `backward` have two
implementations that agree to rounding, selected when a program is traced, by the devices of the
mesh in context (`kernel_name`): on TPUs a Pallas kernel multiplies all groups of rows, elsewhere a
loop runs over the blocks in use. XLA's own grouped matmul would compute every expert on every row.

Algebra of a row x with router weight s, of its expert's gate, up and down matrices:

    g = x @ gate    u = x @ up    h = silu(g) * u    y = h @ down    output = s * y

and backward, from the cotangent dy of the output before the weight s is applied to it:

    dh = dy @ down.T                    d_s = sum(h * dh)
    d_g = s * dh * u * silu'(g)         d_u = s * dh * silu(g)
    dx = d_g @ gate.T + d_u @ up.T
    d_gate = sum x.T @ d_g              d_up = sum x.T @ d_u        d_down = sum (s * h).T @ dy
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moddistill.distributed.sharding import device_kind

Experts = dict[str, Array]  # gate [E, D, F], up [E, D, F], down [E, F, D]
_LANES = 128  # of a TPU's registers
_GROUP_SIZES = (8, 4, 2, 1)  # blocks of one expert that are multiplied at one time
_TILE = 2048  # bytes of a tile's row that fit into the vector memory of every TPU generation


def kernel_name() -> str:
    """The implementation used on the devices in context, for logs."""
    return "Pallas grouped matmul" if _on_tpu() else "loop over blocks of one expert"


def _on_tpu() -> bool:
    return device_kind().startswith("TPU")


def _megablox() -> ModuleType:
    """JAX's Pallas kernels for TPUs, an experimental module that CPUs and GPUs do not import."""
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def forward(
    tokens: Float[Array, "G C D"], experts: Experts, blocks: Int[Array, "E"]
) -> tuple[Float[Array, "G C D"], Float[Array, "G C F"], Float[Array, "G C F"]]:
    """Outputs y, and g and u for the backward pass.

    Args:
      blocks: number of blocks of each expert.
    """
    compute = forward_kernel if _on_tpu() else forward_loop
    return compute(tokens, experts, blocks)


def backward(
    tokens: Float[Array, "G C D"],
    scales: Float[Array, "G C"],
    d_output: Float[Array, "G C D"],
    gate: Float[Array, "G C F"],
    up: Float[Array, "G C F"],
    experts: Experts,
    blocks: Int[Array, "E"],
) -> tuple[Float[Array, "G C D"], Float[Array, "G C"], Experts]:
    """Gradients of tokens, of scales and (in float32) of experts.

    Args:
      scales: router weight s of each row.
      d_output: cotangent dy of each row, before `scales`.
      gate, up: g and u from `forward`.
    """
    compute = backward_kernel if _on_tpu() else backward_loop
    return compute(tokens, scales, d_output, gate, up, experts, blocks)


def forward_loop(tokens: Array, experts: Experts, blocks: Array) -> tuple[Array, Array, Array]:
    """`forward` in a loop."""

    def compute(done: tuple[Array, ...], expert: Array, start: Array, size: int) -> Any:
        x = _rows(tokens, start, size)
        kernels = _pick(experts, expert)
        gate, up = _matmul(x, kernels["gate"]), _matmul(x, kernels["up"])
        out = _matmul(_activation(gate, up), kernels["down"])
        return tuple(_put(x, new, start) for x, new in zip(done, (out, gate, up), strict=True))

    shape = (*tokens.shape[:2], experts["gate"].shape[2])
    empty = (jnp.zeros_like(tokens), *(jnp.zeros(shape, tokens.dtype) for _ in range(2)))
    return _loop_over_groups(compute, empty, blocks, len(tokens))


def backward_loop(
    tokens: Array,
    scales: Array,
    d_output: Array,
    gate: Array,
    up: Array,
    experts: Experts,
    blocks: Array,
) -> tuple[Array, Array, Experts]:
    """`backward` in a loop; the gradients of experts are accumulated in float32."""

    def compute(done: Any, expert: Array, start: Array, size: int) -> Any:
        d_tokens, d_scales, d_experts = done
        take = functools.partial(_rows, start=start, size=size)
        x, scale, d_y, g, u = (take(rows) for rows in (tokens, scales, d_output, gate, up))
        kernels = _pick(experts, expert)
        d_hidden = _matmul(d_y, kernels["down"].T, jnp.float32)
        d_scale, d_g, d_u, weighted = _activation_gradients(d_hidden, scale, g, u)
        d_x = _matmul(d_g, kernels["gate"].T, jnp.float32)
        d_x = d_x + _matmul(d_u, kernels["up"].T, jnp.float32)
        # Each kernel's gradient is inputs.T @ cotangent, summed over the groups of its expert.
        pairs = {"gate": (x, d_g), "up": (x, d_u), "down": (weighted, d_y)}
        for name, (inputs, cotangent) in pairs.items():
            d_kernel = _matmul(inputs.T, cotangent, jnp.float32)
            d_experts = d_experts | {name: d_experts[name].at[expert].add(d_kernel)}
        return _put(d_tokens, d_x, start), _put(d_scales, d_scale, start), d_experts

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), experts)
    empty = (jnp.zeros_like(tokens), jnp.zeros_like(scales), zeros)
    return _loop_over_groups(compute, empty, blocks, len(tokens))


def forward_kernel(
    tokens: Array, experts: Experts, blocks: Array, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """`forward` by the Pallas kernel; `interpret` runs it without a TPU, for tests."""
    matmul = functools.partial(_grouped, blocks=blocks, interpret=interpret)
    gate, up = matmul(tokens, experts["gate"]), matmul(tokens, experts["up"])
    return matmul(_activation(gate, up), experts["down"]), gate, up


def backward_kernel(
    tokens: Array,
    scales: Array,
    d_output: Array,
    gate: Array,
    up: Array,
    experts: Experts,
    blocks: Array,
    interpret: bool = False,
) -> tuple[Array, Array, Experts]:
    """`backward` by the Pallas kernel; `interpret` runs it without a TPU, for tests."""
    matmul_transposed = functools.partial(
        _grouped, blocks=blocks, interpret=interpret, transposed=True, dtype=jnp.float32
    )
    d_hidden = matmul_transposed(d_output, experts["down"])
    d_scales, d_gate, d_up, weighted = _activation_gradients(d_hidden, scales, gate, up)
    d_tokens = matmul_transposed(d_gate, experts["gate"])
    d_tokens = d_tokens + matmul_transposed(d_up, experts["up"])
    kernel_gradient = functools.partial(_grouped_outer, blocks=blocks, interpret=interpret)
    d_experts = {
        "gate": kernel_gradient(tokens, d_gate),
        "up": kernel_gradient(tokens, d_up),
        "down": kernel_gradient(weighted, d_output),
    }
    return d_tokens.astype(tokens.dtype), d_scales, d_experts


def _grouped(
    x: Array,
    kernels: Array,
    blocks: Array,
    interpret: bool,
    transposed: bool = False,
    dtype: Any = None,
) -> Array:
    """Rows [G, C, in] times their expert's kernel [E, in, out] ([E, out, in] if `transposed`)."""
    block, most = x.shape[1], _TILE // x.dtype.itemsize
    inputs, outputs = kernels.shape[:0:-1] if transposed else kernels.shape[1:]
    out = _megablox().gmm(
        x.reshape(-1, x.shape[2]),
        kernels,
        blocks * block,
        dtype or x.dtype,
        (block, tile(inputs, most), tile(outputs, most)),
        transpose_rhs=transposed,
        interpret=interpret,
    )
    return out.reshape(*x.shape[:2], -1)


def _grouped_outer(x: Array, y: Array, blocks: Array, interpret: bool) -> Array:
    """`x.T @ y` summed over each expert's rows: [G, C, in] and [G, C, out] to [E, in, out]."""
    block, inputs, outputs = *x.shape[1:], y.shape[2]
    # Accumulators are float32, so one side of their tiles is half as wide. Of the two
    # orientations, the one with less padding is computed.
    tiles = [(tile(inputs, 1024), tile(outputs, 512)), (tile(inputs, 512), tile(outputs, 1024))]
    return _megablox().tgmm(
        x.reshape(-1, x.shape[2]).T,
        y.reshape(-1, y.shape[2]),
        blocks * block,
        jnp.float32,
        (block, *min(tiles, key=lambda t: padded(inputs, t[0]) * padded(outputs, t[1]))),
        interpret=interpret,
    )


def tile(size: int, most: int) -> int:
    """The tile width, in whole lanes, that pads `size` least.

    At least half of `most`: the matmul of smaller tiles is bound by memory bandwidth.
    """
    widths = range(most // 2, most + 1, _LANES)
    return min(widths, key=lambda width: (padded(size, width), -width))


def padded(size: int, width: int) -> int:
    """`size` rounded up to whole tiles of that width."""
    return -(-size // width) * width


def _activation(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _activation_gradients(
    d_hidden: Array, scales: Array, gate: Array, up: Array
) -> tuple[Array, Array, Array, Array]:
    """Backward of `scales * silu(gate) * up`, from the cotangent dh of `silu(gate) * up`.

    Returns the gradients of scales (float32), of gate and of up, and the weighted hidden rows.
    """
    dtype = gate.dtype
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    scales = scales[..., None]
    # silu(g) = g * sigmoid(g), and silu'(g) = sigmoid(g) * (1 + g * (1 - sigmoid(g)))
    sigmoid = jax.nn.sigmoid(gate)
    hidden = gate * sigmoid * up
    d_weighted = scales * d_hidden
    d_gate = d_weighted * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = d_weighted * gate * sigmoid
    d_scales = jnp.sum(hidden * d_hidden, axis=-1)
    return d_scales, d_gate.astype(dtype), d_up.astype(dtype), (scales * hidden).astype(dtype)


def _loop_over_groups(compute: Callable, start: Any, blocks: Array, most: int) -> Any:
    """Carries `start` through `compute(carry, expert, first block, number of blocks)`.

    Shapes are static, the number of blocks of an expert is not. So each expert's blocks are split
    into groups of eight, then at most one of four, of two and of one: few, large matmuls over
    exactly the blocks in use. 13 blocks are a group of eight, of four and of one.
    """
    carry = start
    first = jnp.cumsum(blocks) - blocks  # of each expert, the first block not yet computed
    for size in (size for size in _GROUP_SIZES if size <= most):
        groups = blocks // size
        ends = jnp.cumsum(groups)

        # Group i belongs to the first expert whose groups end after i.
        def body(i, carry, size=size, first=first, starts=ends - groups, ends=ends):
            expert = jnp.searchsorted(ends, i, side="right")
            return compute(carry, expert, first[expert] + (i - starts[expert]) * size, size)

        carry = jax.lax.fori_loop(0, ends[-1], body, carry)
        first, blocks = first + groups * size, blocks % size
    return carry


def _rows(x: Array, start: Array, size: int) -> Array:
    """`size` blocks of [G, C, *] from `start` on, as rows [size * C, *]."""
    blocks = jax.lax.dynamic_slice_in_dim(x, start, size)
    return blocks.reshape(-1, *x.shape[2:])


def _put(x: Array, rows: Array, start: Array) -> Array:
    blocks = rows.reshape(-1, *x.shape[1:]).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, blocks, start, axis=0)


def _matmul(x: Array, kernel: Array, dtype: Any = None) -> Array:
    """`x @ kernel`, accumulated in float32."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def _pick(experts: Experts, expert: Array) -> Experts:
    pick = functools.partial(jax.lax.dynamic_index_in_dim, index=expert, keepdims=False)
    return jax.tree.map(pick, experts)
