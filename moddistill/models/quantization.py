"""Quantized (int8) and offloaded (host memory) layers of a teacher, which needs no gradient.

A quantized kernel is a dict of `int8` [..., in, ...] and `step` [..., 1, ...], with
`kernel ~ int8 * step`: one step per output channel, the largest absolute value over 127. The scan
over layers slices one layer's leaves, `dequantize` fetches and converts them, and only one layer
exists in the compute dtype at a time.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moddistill.params import DECODER_LAYERS, flatten, in_group, unflatten


def quantize(kernels: Float[Array, "..."], axis: int) -> dict[str, Array]:
    """Kernels as int8 and steps, symmetric along `axis`; errors are at most half a step."""
    # kernel / step is within [-127, 127], symmetric without -128, and 0 stays exactly 0. A channel
    # of zeros gets step 1 in place of 0 / 0.
    largest = jnp.max(jnp.abs(kernels.astype(jnp.float32)), axis=axis, keepdims=True)
    step = jnp.where(largest == 0, 1.0, largest / 127)
    rounded = jnp.round(kernels.astype(jnp.float32) / step)
    return {"int8": rounded.astype(jnp.int8), "step": step}


def is_quantized(x: Any) -> bool:
    return isinstance(x, dict) and "int8" in x


def dequantize(params: Any, dtype: Any) -> Any:
    """Parameters on the device, quantized kernels in `dtype`."""

    def ready(leaf: Any) -> Array:
        # Inside jit: XLA schedules the copy from host memory; leaves on the device stay there.
        leaf = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), leaf)
        if not is_quantized(leaf):
            return leaf
        # In float32, so that the only rounding is that of the cast.
        return (leaf["int8"].astype(jnp.float32) * leaf["step"]).astype(dtype)

    return jax.tree.map(ready, params, is_leaf=is_quantized)


def stored_shapes(shapes: dict[str, Any], quantization: str, offload: bool) -> dict[str, Any]:
    """Shapes and shardings of stored parameters.

    Args:
      shapes: of all parameters, unquantized, on the device.
      quantization: `int8` quantizes the matrices of the decoder's layers; others are unchanged.
      offload: whether these matrices are in host memory. Vectors stay on the device: they are
        small, and the TPU compiler rejects some slices of vectors in host memory.
    """
    flat = flatten(shapes)
    if quantization == "int8":
        quantized = {
            path: _quantized_shape(path, x) for path, x in flat.items() if _is_kernel(path)
        }
        # Flattened again, so that `kernel` becomes `kernel/int8` and `kernel/step`.
        flat = flatten(unflatten(flat | quantized))
    if offload:
        flat |= {p: _on_host(x) for p, x in flat.items() if _is_kernel(p.removesuffix("/int8"))}
    return unflatten(flat)


def loading_shapes(stored: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Shapes in which parameters are loaded before `quantize_all` converts them to `stored`.

    Kernels to quantize are loaded into host memory: unquantized, they may not fit on the device.
    """

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        if not is_quantized(x):
            return x
        where = x["int8"].sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(x["int8"].shape, dtype, sharding=where)

    return jax.tree.map(shape, stored, is_leaf=is_quantized)


def quantize_all(params: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """Parameters in the shapes `stored`, converted one by one; each original is freed at once."""
    by_path = flatten(stored)
    flat = flatten(params)
    for path in list(flat):
        if path in by_path:
            flat[path] = jax.device_put(flat[path], by_path[path].sharding)
            continue
        # Donation cannot alias float and int8 buffers, so the original is deleted explicitly.
        kernels = flat.pop(path)
        kernels = jax.device_put(kernels, kernels.sharding.with_memory_kind("device"))
        quantized = jax.jit(functools.partial(quantize, axis=_input_axis(path)))(kernels)
        for name, x in quantized.items():
            flat[f"{path}/{name}"] = jax.device_put(x, by_path[f"{path}/{name}"].sharding)
        kernels.delete()
    return unflatten(flat)


def _is_kernel(path: str) -> bool:
    """Returns whether this is a matrix of the decoder's layers."""
    in_layer = re.fullmatch(DECODER_LAYERS, path) is not None
    return in_layer and in_group(path, "kernels", "experts")


def _input_axis(path: str) -> int:
    """The axis of a kernel's inputs, after those of layers and experts."""
    return 2 if in_group(path, "experts") else 1


def _quantized_shape(path: str, x: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    # Steps are sharded like their kernel, but for the axis of inputs, along which they have size 1.
    axis = _input_axis(path)
    names = list(x.sharding.spec) + [None] * (len(x.shape) - len(x.sharding.spec))
    step_spec = PartitionSpec(*(None if i == axis else name for i, name in enumerate(names)))
    shape = tuple(1 if i == axis else size for i, size in enumerate(x.shape))
    return {
        "int8": jax.ShapeDtypeStruct(x.shape, jnp.int8, sharding=x.sharding),
        "step": jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(x.sharding.mesh, step_spec)
        ),
    }


def _on_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding.with_memory_kind("pinned_host")
    )
