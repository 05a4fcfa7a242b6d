"""Layers kept small or away: int8 kernels, host memory; made ready one layer at a time.

For a teacher, which has no gradient. A packed kernel is a dict of `int8` and `step`. The scan over
layers takes one layer's leaves, `unpack` turns them into what the layer computes with, and nothing
larger than that exists beside the packed parameters.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moddistill.params import DECODER_LAYERS, flatten, in_group, unflatten


def pack(kernels: Float[Array, "..."], axis: int) -> dict[str, Array]:
    """Kernels as int8, with a step for every line along `axis`, of which the largest value is 127.

    A value is off by half a step at most.
    """
    largest = jnp.max(jnp.abs(kernels.astype(jnp.float32)), axis=axis, keepdims=True)
    step = jnp.where(largest == 0, 1.0, largest / 127)
    rounded = jnp.round(kernels.astype(jnp.float32) / step)
    return {"int8": rounded.astype(jnp.int8), "step": step}


def is_packed(x: Any) -> bool:
    return isinstance(x, dict) and "int8" in x


def unpack(params: Any, dtype: Any) -> Any:
    """Parameters on the device, packed kernels in `dtype`."""

    def ready(leaf: Any) -> Array:
        leaf = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), leaf)
        if not is_packed(leaf):
            return leaf
        return (leaf["int8"].astype(jnp.float32) * leaf["step"]).astype(dtype)

    return jax.tree.map(ready, params, is_leaf=is_packed)


def packed_shapes(shapes: dict[str, Any], weights: str, memory: str) -> dict[str, Any]:
    """Shapes with shardings of parameters as they are kept.

    Args:
      shapes: of all parameters, on the device.
      weights: `int8` for the matrices of the decoder's layers; others as they are.
      memory: `host` for these matrices; `device`. The compiler for TPUs refuses some of the
        vectors that are cut from host memory, and they are small.
    """
    flat = flatten(shapes)
    if weights == "int8":
        packed = {path: _packed_shape(path, x) for path, x in flat.items() if _is_kernel(path)}
        flat = flatten(unflatten(flat | packed))
    if memory == "host":
        flat |= {p: _on_host(x) for p, x in flat.items() if _is_kernel(p.removesuffix("/int8"))}
    return unflatten(flat)


def unpacked_shapes(kept: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Shapes in which parameters are read that `pack_all` then brings to those `kept`.

    What will be packed is read into host memory: unpacked, it may not fit on the device.
    """

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        if not is_packed(x):
            return x
        where = x["int8"].sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(x["int8"].shape, dtype, sharding=where)

    return jax.tree.map(shape, kept, is_leaf=is_packed)


def pack_all(params: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """Parameters as `kept` says, one after the other, each given up for its packed form."""
    places = flatten(kept)
    flat = flatten(params)
    for path in list(flat):
        if path in places:
            flat[path] = jax.device_put(flat[path], places[path].sharding)
            continue
        kernels = flat.pop(path)
        kernels = jax.device_put(kernels, kernels.sharding.with_memory_kind("device"))
        packed = jax.jit(functools.partial(pack, axis=_line(path)))(kernels)
        for name, x in packed.items():
            flat[f"{path}/{name}"] = jax.device_put(x, places[f"{path}/{name}"].sharding)
        kernels.delete()
    return unflatten(flat)


def _is_kernel(path: str) -> bool:
    """Whether this is a matrix of the decoder's layers."""
    in_layer = re.fullmatch(DECODER_LAYERS, path) is not None
    return in_layer and in_group(path, "kernels", "experts")


def _line(path: str) -> int:
    """The axis of a kernel's inputs, behind those of layers and experts."""
    return 2 if in_group(path, "experts") else 1


def _packed_shape(path: str, x: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    axis = _line(path)
    names = list(x.sharding.spec) + [None] * (len(x.shape) - len(x.sharding.spec))
    lines = PartitionSpec(*(None if i == axis else name for i, name in enumerate(names)))
    shape = tuple(1 if i == axis else size for i, size in enumerate(x.shape))
    return {
        "int8": jax.ShapeDtypeStruct(x.shape, jnp.int8, sharding=x.sharding),
        "step": jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(x.sharding.mesh, lines)
        ),
    }


def _on_host(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding.with_memory_kind("pinned_host")
    )
