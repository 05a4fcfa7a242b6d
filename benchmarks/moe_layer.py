"""Forward and backward pass of an expert layer of Qwen2-0.5B: 1,024 tokens, 4 experts, top 2.

    python -m benchmarks.moe_layer [--rounds 7] [--json]

Compared with a dense layer of the same active FLOPs (twice as wide) and with a loop over experts in
torch, in float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import head_to_head

TOKENS, WIDTH, MLP, EXPERTS, TOP_K = 1024, 896, 4864, 4, 2


def arrays() -> dict[str, np.ndarray]:
    """Returns tokens [T, D], router [D, E] and kernels of the experts [E, D, F] and [E, F, D]."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * shape[-2] ** -0.5

    return {
        "tokens": rng.standard_normal((TOKENS, WIDTH), np.float32),
        "router": normal(WIDTH, EXPERTS),
        "gate": normal(EXPERTS, WIDTH, MLP),
        "up": normal(EXPERTS, WIDTH, MLP),
        "down": normal(EXPERTS, MLP, WIDTH),
    }


def figures(gradients: dict[str, Any]) -> dict[str, float]:
    """Returns norms of the first slice of each gradient: the first token, row or expert."""
    return {name: float(np.linalg.norm(np.asarray(x[0]))) for name, x in gradients.items()}


def prepare_moddistill(_: Path) -> Callable[[], dict[str, float]]:
    import jax
    import jax.numpy as jnp

    from moddistill.models.moe.expert_parallel import mix_experts
    from moddistill.models.moe.router import top_k_routing

    params = {name: jnp.asarray(x) for name, x in arrays().items()}

    def loss(params):
        probs = jax.nn.softmax(params["tokens"] @ params["router"])
        chosen, weights = top_k_routing(probs, TOP_K, True)
        experts = {name: params[name] for name in ("gate", "up", "down")}
        keep = jnp.ones(chosen.shape, bool)
        return jnp.sum(mix_experts(params["tokens"], weights, chosen, keep, experts) ** 2)

    step = jax.jit(jax.grad(loss))
    return lambda: figures(jax.block_until_ready(step(params)))


def prepare_dense(_: Path) -> Callable[[], dict[str, float]]:
    import jax
    import jax.numpy as jnp

    from moddistill.models.layers import SwiGLU

    layer = SwiGLU(TOP_K * MLP, jnp.float32)
    tokens = jnp.asarray(arrays()["tokens"])[None]
    params = jax.jit(layer.init)(jax.random.key(0), tokens)
    step = jax.jit(jax.grad(lambda p, x: jnp.sum(layer.apply(p, x) ** 2), argnums=(0, 1)))

    def run() -> dict[str, float]:
        jax.block_until_ready(step(params, tokens))
        return {}  # its weights differ, so there is nothing to compare

    return run


def prepare_torch(_: Path) -> Callable[[], dict[str, float]]:
    import torch

    params = {name: torch.from_numpy(x).requires_grad_() for name, x in arrays().items()}

    def run() -> dict[str, float]:
        for x in params.values():
            x.grad = None
        tokens = params["tokens"]
        weights, chosen = torch.softmax(tokens @ params["router"], -1).topk(TOP_K)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for e in range(EXPERTS):
            rows, choice = torch.where(chosen == e)
            x = tokens[rows]
            hidden = torch.nn.functional.silu(x @ params["gate"][e]) * (x @ params["up"][e])
            y = (hidden @ params["down"][e]) * weights[rows, choice, None]
            out = out.index_add(0, rows, y)
        (out**2).sum().backward()
        return figures({name: x.grad for name, x in params.items()})

    return run


SIDES = {"moddistill": prepare_moddistill, "dense": prepare_dense, "torch": prepare_torch}

if __name__ == "__main__":
    head_to_head.main("benchmarks.moe_layer", __doc__)
