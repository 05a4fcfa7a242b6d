"""Gated feed-forward layers of several experts, over rows in blocks of one expert each.

Every expert's blocks lie one after the other; those behind the last one in use belong to none, and
what they give has no meaning. `forward` and `backward` have two forms that agree to rounding. Which
one a program gets is decided when it is traced, by the devices of the mesh in context: on TPU a
Pallas kernel multiplies all groups of rows, elsewhere a loop takes the blocks in use, some at a
time. XLA's own grouped product would compute every expert on every row.
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
_PIECES = (8, 4, 2, 1)  # blocks that are multiplied at one time, largest first
_TILE = 2048  # most bytes of a row of a tile: what fits into the memory of all TPU cores


def form() -> str:
    """How rows of several experts are multiplied on the devices in context, for the log."""
    return "one Pallas kernel" if _on_tpu() else "a loop over pieces of one expert"


def _on_tpu() -> bool:
    return device_kind().startswith("TPU")


def _megablox() -> ModuleType:
    """JAX's Pallas kernels for TPUs, an experimental module that CPUs and GPUs do not import."""
    return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


def forward(
    tokens: Float[Array, "G C D"], experts: Experts, blocks: Int[Array, "E"]
) -> tuple[Float[Array, "G C D"], Float[Array, "G C F"], Float[Array, "G C F"]]:
    """`down(silu(gate(x)) * up(x))` of each row with its expert, and both inner products.

    Args:
      blocks: number of blocks of each expert.
    """
    compute = forward_by_kernel if _on_tpu() else forward_by_pieces
    return compute(tokens, experts, blocks)


def backward(
    tokens: Float[Array, "G C D"],
    scales: Float[Array, "G C"],
    outer: Float[Array, "G C D"],
    gate: Float[Array, "G C F"],
    up: Float[Array, "G C F"],
    experts: Experts,
    blocks: Int[Array, "E"],
) -> tuple[Float[Array, "G C D"], Float[Array, "G C"], Experts]:
    """Gradients of `sum(outer * scales * output)`: of tokens, of scales, of experts in float32."""
    compute = backward_by_kernel if _on_tpu() else backward_by_pieces
    return compute(tokens, scales, outer, gate, up, experts, blocks)


def forward_by_pieces(tokens: Array, experts: Experts, blocks: Array) -> tuple[Array, Array, Array]:
    """`forward` in a loop."""

    def compute(done: tuple[Array, ...], expert: Array, start: Array, size: int) -> Any:
        x = _rows(tokens, start, size)
        kernels = _pick(experts, expert)
        gate, up = _product(x, kernels["gate"]), _product(x, kernels["up"])
        out = _product(_inner(gate, up), kernels["down"])
        return tuple(_put(x, new, start) for x, new in zip(done, (out, gate, up), strict=True))

    inner = (*tokens.shape[:2], experts["gate"].shape[2])
    empty = (jnp.zeros_like(tokens), *(jnp.zeros(inner, tokens.dtype) for _ in range(2)))
    return _over_pieces(compute, empty, blocks, len(tokens))


def backward_by_pieces(
    tokens: Array,
    scales: Array,
    outer: Array,
    gate: Array,
    up: Array,
    experts: Experts,
    blocks: Array,
) -> tuple[Array, Array, Experts]:
    """`backward` in a loop; the gradients of experts are added up in float32."""

    def compute(done: Any, expert: Array, start: Array, size: int) -> Any:
        d_tokens, d_scales, d_experts = done
        take = functools.partial(_rows, start=start, size=size)
        x, scale, y, gate_, up_ = (take(rows) for rows in (tokens, scales, outer, gate, up))
        kernels = _pick(experts, expert)
        through = _product(y, kernels["down"].T, jnp.float32)
        d_scale, d_gate, d_up, weighted = _inner_gradients(through, scale, gate_, up_)
        d_x = _product(d_gate, kernels["gate"].T, jnp.float32)
        d_x = d_x + _product(d_up, kernels["up"].T, jnp.float32)
        new = {"gate": (x, d_gate), "up": (x, d_up), "down": (weighted, y)}
        for name, (rows, columns) in new.items():
            product = _product(rows.T, columns, jnp.float32)
            d_experts = d_experts | {name: d_experts[name].at[expert].add(product)}
        return _put(d_tokens, d_x, start), _put(d_scales, d_scale, start), d_experts

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), experts)
    empty = (jnp.zeros_like(tokens), jnp.zeros_like(scales), zeros)
    return _over_pieces(compute, empty, blocks, len(tokens))


def forward_by_kernel(
    tokens: Array, experts: Experts, blocks: Array, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """`forward` in one kernel; `interpret` runs it without a TPU, for tests."""
    product = functools.partial(_grouped, blocks=blocks, interpret=interpret)
    gate, up = product(tokens, experts["gate"]), product(tokens, experts["up"])
    return product(_inner(gate, up), experts["down"]), gate, up


def backward_by_kernel(
    tokens: Array,
    scales: Array,
    outer: Array,
    gate: Array,
    up: Array,
    experts: Experts,
    blocks: Array,
    interpret: bool = False,
) -> tuple[Array, Array, Experts]:
    """`backward` in one kernel; `interpret` runs it without a TPU, for tests."""
    through = functools.partial(
        _grouped, blocks=blocks, interpret=interpret, transposed=True, dtype=jnp.float32
    )
    d_scales, d_gate, d_up, weighted = _inner_gradients(
        through(outer, experts["down"]), scales, gate, up
    )
    d_tokens = through(d_gate, experts["gate"]) + through(d_up, experts["up"])
    of_kernel = functools.partial(_grouped_outer, blocks=blocks, interpret=interpret)
    d_experts = {
        "gate": of_kernel(tokens, d_gate),
        "up": of_kernel(tokens, d_up),
        "down": of_kernel(weighted, outer),
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
    """[G, C, in] with [E, in, out], or [E, out, in] transposed, to [G, C, out]."""
    block, most = x.shape[1], _TILE // x.dtype.itemsize
    inputs, outputs = kernels.shape[:0:-1] if transposed else kernels.shape[1:]
    product = _megablox().gmm(
        x.reshape(-1, x.shape[2]),
        kernels,
        blocks * block,
        dtype or x.dtype,
        (block, tile(inputs, most), tile(outputs, most)),
        transpose_rhs=transposed,
        interpret=interpret,
    )
    return product.reshape(*x.shape[:2], -1)


def _grouped_outer(x: Array, y: Array, blocks: Array, interpret: bool) -> Array:
    """[G, C, in] and [G, C, out] to the sums over each expert's rows [E, in, out]."""
    block, inputs, outputs = *x.shape[1:], y.shape[2]
    # Results are float32, so one side of their tiles is half as wide.
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
    """Width of the tiles, in whole lanes, with which the least beyond `size` is computed.

    At least half of `most`: smaller ones wait for memory.
    """
    widths = range(most // 2, most + 1, _LANES)
    return min(widths, key=lambda width: (padded(size, width), -width))


def padded(size: int, width: int) -> int:
    """`size` in whole tiles of that width."""
    return -(-size // width) * width


def _inner(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _inner_gradients(
    through: Array, scales: Array, gate: Array, up: Array
) -> tuple[Array, Array, Array, Array]:
    """From the cotangent of the unweighted inner rows to what it gives.

    Returns the gradients of scales (float32), of gate and of up, and the inner rows, weighted.
    """
    dtype = gate.dtype
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    scales = scales[..., None]
    share = jax.nn.sigmoid(gate)
    inner = gate * share * up
    d_inner = scales * through
    d_gate = d_inner * up * share * (1 + gate * (1 - share))
    d_up = d_inner * gate * share
    d_scales = jnp.sum(inner * through, axis=-1)
    return d_scales, d_gate.astype(dtype), d_up.astype(dtype), (scales * inner).astype(dtype)


def _over_pieces(compute: Callable, start: Any, blocks: Array, most: int) -> Any:
    """`start`, changed by `compute(it, expert, first block, number of blocks)` for all pieces.

    Of each expert's blocks as many eights are taken as there are, then a four, a two and a one:
    few, large products, of exactly the blocks in use.
    """
    done = start
    first = jnp.cumsum(blocks) - blocks
    for size in (size for size in _PIECES if size <= most):
        pieces = blocks // size
        ends = jnp.cumsum(pieces)

        def body(i, done, size=size, first=first, before=ends - pieces, ends=ends):
            expert = jnp.searchsorted(ends, i, side="right")
            return compute(done, expert, first[expert] + (i - before[expert]) * size, size)

        done = jax.lax.fori_loop(0, ends[-1], body, done)
        first, blocks = first + pieces * size, blocks % size
    return done


def _rows(x: Array, start: Array, size: int) -> Array:
    """Blocks from `start` on [G, C, *] as rows [size * C, *]."""
    taken = jax.lax.dynamic_slice_in_dim(x, start, size)
    return taken.reshape(-1, *x.shape[2:])


def _put(x: Array, rows: Array, start: Array) -> Array:
    blocks = rows.reshape(-1, *x.shape[1:]).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, blocks, start, axis=0)


def _product(x: Array, kernel: Array, dtype: Any = None) -> Array:
    """Accumulated in float32."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(dtype or x.dtype)


def _pick(experts: Experts, expert: Array) -> Experts:
    pick = functools.partial(jax.lax.dynamic_index_in_dim, index=expert, keepdims=False)
    return jax.tree.map(pick, experts)
