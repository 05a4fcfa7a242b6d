"""Loss and gradient of KL and cross entropy at a quarter of 2,048 positions, 151,936 tokens.

    python -m benchmarks.kd_loss [--rounds 7] [--json]

Hidden sizes of Qwen2-0.5B and Qwen2-7B, float32, gradients of hidden states and head. The torch
side follows the reference code: all logits of both models, then the mask. moddistill computes
logits of 128 positions at a time, half of the default.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import head_to_head

POSITIONS, VOCABULARY, STUDENT, TEACHER = 2048, 151_936, 896, 3584


def arrays() -> tuple[np.ndarray, ...]:
    """Returns hidden states and heads of both models, labels, and the supervised positions."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    labels = rng.integers(0, VOCABULARY, POSITIONS)
    supervised = np.arange(POSITIONS) % 4 == 0
    student = normal(POSITIONS, STUDENT), normal(VOCABULARY, STUDENT) * STUDENT**-0.5
    teacher = normal(POSITIONS, TEACHER), normal(VOCABULARY, TEACHER) * TEACHER**-0.5
    return *student, *teacher, labels, supervised


def figures(d_hidden: Any, d_head: Any) -> dict[str, float]:
    """Returns the norms of both gradients, of the head's only over its first 1,000 rows."""
    lengths = {"d_hidden": d_hidden, "d_head": d_head[:1000]}
    return {name: float(np.linalg.norm(np.asarray(x))) for name, x in lengths.items()}


def prepare_moddistill(_: Path) -> Callable[[], dict[str, float]]:
    import jax
    import jax.numpy as jnp

    from moddistill.losses.chunked import LogitInputs, chunked_token_loss
    from moddistill.losses.divergences import cross_entropy, divergence
    from moddistill.models.logits import masked_logits
    from moddistill.teachers.targets import Targets

    *matrices, labels, supervised = arrays()
    hidden, head, taught, teacher_head = map(jnp.asarray, matrices)
    labels = jnp.asarray(labels, jnp.int32)
    weight = jnp.asarray(supervised / supervised.sum(), jnp.float32)
    del matrices

    real_ids = ((0, VOCABULARY),)

    def token_fn(logits, targets, labels):
        teacher_logits = masked_logits(targets.per_position, targets.shared, real_ids)
        return {"kd": divergence(logits, teacher_logits), "ce": cross_entropy(logits, labels)}

    def loss(hidden, head, taught, teacher_head):
        inputs, targets = LogitInputs(hidden, head), Targets(taught, teacher_head)
        weights = {"kd": weight, "ce": weight}
        return chunked_token_loss(
            token_fn, inputs, labels, weights, targets, chunk_size=128, real_ids=real_ids
        )[0]

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    def run() -> dict[str, float]:
        _, gradients = jax.block_until_ready(step(hidden, head, taught, teacher_head))
        return figures(*gradients)

    return run


def prepare_torch(_: Path) -> Callable[[], dict[str, float]]:
    import torch

    *matrices, labels, supervised = arrays()
    hidden, head, taught, teacher_head = map(torch.from_numpy, matrices)
    labels, supervised = torch.from_numpy(labels), torch.from_numpy(supervised)
    hidden.requires_grad_()
    head.requires_grad_()

    def run() -> dict[str, float]:
        hidden.grad = head.grad = None
        logits = hidden @ head.T
        with torch.no_grad():
            target = torch.softmax(taught @ teacher_head.T, -1)
        align = -torch.nan_to_num(target * torch.log_softmax(logits, -1)).sum(-1)
        ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        ((align + ce) * supervised).sum().div(supervised.sum()).backward()
        return figures(hidden.grad, head.grad)

    return run


SIDES = {"moddistill": prepare_moddistill, "torch": prepare_torch}

if __name__ == "__main__":
    head_to_head.main("benchmarks.kd_loss", __doc__)
