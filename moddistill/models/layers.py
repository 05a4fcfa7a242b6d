"""Norms, rotary positions and feed-forward layers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

DType = Any

MATMUL = "matmul"  # name of matmul results, which `remat="matmuls"` saves

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "matmuls": jax.checkpoint_policies.save_only_these_names(MATMUL),
}


def rematerialised(layer: type[nn.Module], remat: str) -> type[nn.Module]:
    """A layer that saves part of its activations for the gradient, and recomputes the others.

    Args:
      remat: `full` saves the layer's inputs, `matmuls` also the results of its matmuls with
        parameters, `none` everything.
    """
    if remat == "none":
        return layer
    return nn.remat(layer, prevent_cse=False, policy=_POLICIES[remat])


def init_normal(*axes: str, std: float = 0.02) -> Callable:
    """Normal initialiser whose parameter carries logical axis names."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def init_fan_in(inputs: tuple[str, ...], outputs: tuple[str, ...], batch: tuple[str, ...] = ()):
    """Normal initialiser of variance 1 / inputs, for a kernel [*batch, *inputs, *outputs]."""
    first, last = len(batch), len(batch) + len(inputs)
    initializer = nn.initializers.variance_scaling(
        1.0,
        "fan_in",
        "normal",
        in_axis=tuple(range(first, last)),
        out_axis=tuple(range(last, last + len(outputs))),
        batch_axis=tuple(range(first)),
    )
    return nn.with_logical_partitioning(initializer, batch + inputs + outputs)


def init_zeros(*axes: str) -> Callable:
    return nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)


def init_ones(*axes: str) -> Callable:
    return nn.with_logical_partitioning(nn.initializers.ones_init(), axes)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 (Zhang & Sennrich 2019); `axis` names the last dimension."""

    eps: float
    axis: str = "embed"

    @nn.compact
    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", init_ones(self.axis), hidden.shape[-1:], jnp.float32)
        x = hidden.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * _like(scale, x)).astype(hidden.dtype)


class LayerNorm(nn.Module):
    """Layer norm in float32 (Ba et al. 2016)."""

    eps: float

    @nn.compact
    def __call__(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", init_ones("embed"), hidden.shape[-1:], jnp.float32)
        bias = self.param("bias", init_zeros("embed"), hidden.shape[-1:], jnp.float32)
        x = hidden.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * _like(scale, x) + _like(bias, x)).astype(hidden.dtype)


def _like(vector: Array, x: Array) -> Array:
    """A [D] parameter in the dtype and rank of `x`, so that nothing is promoted implicitly."""
    return jnp.expand_dims(vector.astype(x.dtype), range(x.ndim - 1))


class Linear(nn.Module, kw_only=True):
    """Dense layer over the last `len(axes[0])` dimensions, computed in `dtype`.

    `inputs` and `outputs` name the logical axes of the kernel's input and output dimensions.
    """

    features: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    use_bias: bool
    dtype: DType

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        n = len(self.inputs)
        shape = x.shape[-n:] + self.features
        kernel = self.param(
            "kernel", init_fan_in(self.inputs, self.outputs), shape, jnp.float32
        ).astype(self.dtype)
        # One matmul of two matrices: on CPUs its gradient is much faster than a batched one's.
        width = math.prod(shape[:n])
        y = x.astype(self.dtype).reshape(-1, width) @ kernel.reshape(width, -1)
        y = checkpoint_name(y, MATMUL)
        y = y.reshape(*x.shape[:-n], *self.features)
        if self.use_bias:
            bias = self.param("bias", init_zeros(*self.outputs), self.features, jnp.float32)
            y = y + jnp.expand_dims(bias.astype(self.dtype), range(x.ndim - n))
        return y


def rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotary position embedding (Su et al. 2021); dimension i is paired with i + H / 2."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class SwiGLU(nn.Module):
    """Gated feed-forward layer, `down(silu(gate(x)) * up(x))` (Shazeer 2020)."""

    intermediate_size: int
    dtype: DType

    @nn.compact
    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        def linear(name: str, features: int, inputs: str, outputs: str) -> Linear:
            return Linear(
                features=(features,),
                inputs=(inputs,),
                outputs=(outputs,),
                use_bias=False,
                dtype=self.dtype,
                name=name,
            )

        gate = linear("gate", self.intermediate_size, "embed", "mlp")(hidden)
        up = linear("up", self.intermediate_size, "embed", "mlp")(hidden)
        return linear("down", hidden.shape[-1], "mlp", "embed")(nn.silu(gate) * up)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
    return x * nn.sigmoid(1.702 * x)


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by the error function, not its tanh approximation."""
    return nn.gelu(x, approximate=False)


def tanh_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its tanh approximation, the activation of SigLIP."""
    return nn.gelu(x, approximate=True)
