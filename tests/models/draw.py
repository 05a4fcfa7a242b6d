"""Random parameters and inputs of a size that makes outputs of order one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moddistill.models.batch import padded_batch


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, *inputs):
    """`module.apply`, compiled once for equal modules and shapes."""
    return module.apply({"params": params}, *inputs)


def params(module, *inputs, seed=0, **more):
    """Parameters of a module; norms and biases are away from where training starts."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs, **more)["params"]

    def leaf(path, shape):
        noise = rng.normal(size=shape.shape).astype(np.float32)
        return jnp.asarray(1 + noise / 5 if path[-1].key == "scale" else noise / 4)

    return jax.tree_util.tree_map_with_path(leaf, nn.unbox(shapes))


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def text(config, rows, length, seed=1):
    """A batch of real tokens of a decoder config, without images."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.real_ids[-1][1], (rows, length))
    return jax.tree.map(jnp.int32, padded_batch(tokens, np.full(rows, length)))


def pixels(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
