import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from moddistill.config import ExpertConfig, OptimConfig
from moddistill.models.vlm import abstract_params
from moddistill.params import flatten
from moddistill.training.optim import decay_mask, make_optimizer, schedule


def test_schedule_has_linear_warmup_and_cosine_decay():
    rate = schedule(OptimConfig(lr=2.0, warmup_ratio=0.1), steps=100)
    # 10 steps of warm-up; 55 is half of the 90 that follow, where the cosine is at half.
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 1, 2, 1, 0], atol=1e-6
    )


def test_schedule_without_warm_up_starts_at_its_peak():
    assert schedule(OptimConfig(lr=0.5, warmup_ratio=0.0), steps=1)(0) == 0.5


def test_matrices_are_decayed_and_nothing_else(tiny_architecture):
    config = tiny_architecture("tiny", ExpertConfig(residual=True))
    shapes = flatten(nn.unbox(abstract_params(config)))
    decayed = {path for path, yes in decay_mask(shapes).items() if yes}
    ends = {path.split("/")[-1] for path in decayed}
    assert ends == {"kernel", "embedding", "experts_gate", "experts_up", "experts_down"}
    rest = {path.split("/")[-1] for path in shapes.keys() - decayed}
    assert rest == {
        "bias", "scale", "router", "blend", "blend_bias", "positions", "class_token"
    }  # fmt: skip


def adamw_by_hand(param, grads, lr, config, decay):
    """Two moments with bias correction, and decoupled decay (Loshchilov & Hutter)."""
    m = v = 0.0
    for t, (grad, rate) in enumerate(zip(grads, lr, strict=True), start=1):
        m = config.b1 * m + (1 - config.b1) * grad
        v = config.b2 * v + (1 - config.b2) * grad**2
        update = (m / (1 - config.b1**t)) / (np.sqrt(v / (1 - config.b2**t)) + config.eps)
        param = param - rate * (update + (config.weight_decay if decay else 0) * param)
    return param


def test_updates_equal_adamw_by_hand():
    config = OptimConfig(lr=0.1, weight_decay=0.3, warmup_ratio=0.0, clip_norm=0.0)
    optimizer = make_optimizer(config, steps=4)
    params = {"a/kernel": jnp.asarray([2.0]), "a/bias": jnp.asarray([2.0])}
    state = optimizer.init(params)
    grads = [3.0, -1.0, 0.5]
    for grad in grads:
        gradient = {name: jnp.full(1, grad) for name in params}
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    lr = [0.1 * (1 + np.cos(np.pi * t / 4)) / 2 for t in range(3)]
    for name, decay in (("a/kernel", True), ("a/bias", False)):
        expected = adamw_by_hand(2.0, grads, lr, config, decay)
        np.testing.assert_allclose(params[name], [expected], rtol=1e-5)


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, [3.0, 4.0]), (1.0, [0.6, 0.8])])
def test_clipping_is_by_the_norm_of_all_gradients(clip_norm, expected):
    # With b1 = 0 the first moment is the gradient as the optimizer sees it.
    optimizer = make_optimizer(OptimConfig(b1=0.0, clip_norm=clip_norm), steps=10)
    grads = {"a/kernel": jnp.asarray([3.0]), "b/kernel": jnp.asarray([4.0])}
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    [adam] = [x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)]
    np.testing.assert_allclose(
        [adam.mu["a/kernel"][0], adam.mu["b/kernel"][0]], expected, rtol=1e-6
    )


def is_adam(x):
    return isinstance(x, optax.ScaleByAdamState)
