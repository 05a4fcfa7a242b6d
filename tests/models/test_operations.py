"""Operations that an expert layer carries out, beyond those of the experts that tokens chose."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moddistill.models.moe import grouped_matmul
from moddistill.models.moe.dispatch import block_size

EXPERTS, TOP_K = 4, 2
MEGABLOX = grouped_matmul._megablox()
SPREADS = pytest.mark.parametrize("spread", ["random", "wasteful"])


def loads(tokens, spread):
    """Block size and blocks of each expert; wasteful is one row more than fills whole blocks."""
    rows = TOP_K * tokens
    block = block_size(rows, EXPERTS)
    if spread == "random":
        chosen = np.random.default_rng(0).integers(0, EXPERTS, rows)
        counts = np.bincount(chosen, minlength=EXPERTS)
    else:
        first = rows // EXPERTS // block * block + 1
        counts = np.array([first] * (EXPERTS - 1) + [rows - first * (EXPERTS - 1)])
    return block, jnp.asarray(-(-counts // block), jnp.int32)


def inputs(tokens, block, width, mlp, dtype):
    """Shapes of rows, experts, inner rows and scales."""

    def shape(*size):
        return jax.ShapeDtypeStruct(size, dtype)

    count = TOP_K * tokens // block + EXPERTS
    experts = {name: shape(EXPERTS, width, mlp) for name in ("gate", "up")}
    experts["down"] = shape(EXPERTS, mlp, width)
    scales = jax.ShapeDtypeStruct((count, block), jnp.float32)
    return shape(count, block, width), experts, shape(count, block, mlp), scales


def ideal(tokens, width, mlp):
    """Three products a row, each with two more for its gradient."""
    return 3 * 3 * 2 * TOP_K * tokens * width * mlp


@pytest.fixture
def grids(monkeypatch):
    """Of each grouped product that is traced: rows, both widths, tiles, whether empty groups do."""
    found = []

    def spy_gmm(x, kernels, sizes, dtype, tiling, transpose_rhs, interpret):
        found.append((len(x), x.shape[1], kernels.shape[1 if transpose_rhs else 2], tiling, False))
        return MEGABLOX.gmm(x, kernels, sizes, dtype, tiling, transpose_rhs=transpose_rhs)

    def spy_tgmm(x, y, sizes, dtype, tiling, interpret):
        found.append((len(y), len(x), y.shape[1], tiling, True))
        return MEGABLOX.tgmm(x, y, sizes, dtype, tiling)

    spies = types.SimpleNamespace(gmm=spy_gmm, tgmm=spy_tgmm)
    monkeypatch.setattr(grouped_matmul, "_megablox", lambda: spies)
    return found


def multiplied(group_sizes, rows, inner, outer, tiling, visit_empty_groups):
    """Operations of all tiles in the grid of a product."""
    _, visits = MEGABLOX.make_group_metadata(
        group_sizes=group_sizes,
        m=rows,
        tm=tiling[0],
        start_group=jnp.int32(0),
        num_nonzero_groups=EXPERTS,
        visit_empty_groups=visit_empty_groups,
    )
    tiles = int(visits) * -(-inner // tiling[1]) * -(-outer // tiling[2])
    return 2 * tiles * math.prod(tiling)


@SPREADS
@pytest.mark.parametrize(
    ("width", "mlp"),
    [(896, 4864), (1536, 8960), (2048, 5504)],
    ids=["qwen2-0.5b", "qwen2-1.5b", "qwen1.5-1.8b"],
)
@pytest.mark.parametrize("tokens", [1024, 16384])
def test_of_the_kernel_for_tpus(grids, tokens, width, mlp, spread):
    block, blocks = loads(tokens, spread)
    x, experts, inner, scales = inputs(tokens, block, width, mlp, jnp.bfloat16)

    def both(x, experts, inner, scales):
        grouped_matmul.forward_kernel(x, experts, blocks)
        grouped_matmul.backward_kernel(x, scales, x, inner, inner, experts, blocks)

    jax.eval_shape(both, x, experts, inner, scales)
    assert len(grids) == 9
    done = sum(multiplied(blocks * block, *grid) for grid in grids)
    assert 1 <= done / ideal(tokens, width, mlp) <= 1.25


@SPREADS
@pytest.mark.parametrize("tokens", [1024, 16384])
def test_of_the_loop_elsewhere(monkeypatch, tokens, spread):
    """Counted while it runs; narrow, since widths are multiplied as they are."""
    width, mlp = 4, 8
    done, product = [], grouped_matmul._matmul

    def spy(x, kernel, dtype=None):
        operations = 2 * x.shape[0] * x.shape[1] * kernel.shape[1]
        jax.debug.callback(lambda: done.append(operations))
        return product(x, kernel, dtype)

    monkeypatch.setattr(grouped_matmul, "_matmul", spy)
    block, blocks = loads(tokens, spread)
    shapes = inputs(tokens, block, width, mlp, jnp.float32)
    x, experts, inner, scales = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)

    @jax.jit
    def both(blocks):
        forward = grouped_matmul.forward_loop(x, experts, blocks)
        backward = grouped_matmul.backward_loop(x, scales, x, inner, inner, experts, blocks)
        return forward, backward

    jax.block_until_ready(both(blocks))
    jax.effects_barrier()
    assert 1 <= sum(done) / ideal(tokens, width, mlp) <= 1.25
