"""Device mesh, and the table of sharding rules from logical axis names to mesh axes.

Parameters carry logical names from their initialisation. A name without a rule is an error, since
Flax would silently replicate a misspelt one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.linen.spmd import RulesFallback
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from moddistill.config import MeshConfig
from moddistill.errors import UserError, invalid, not_one_of
from moddistill.params import flatten

MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
BATCH_AXES = ("data", "fsdp", "expert")  # shard the batch dimension

RULES: dict[str, str | tuple[str, ...] | None] = {
    "embed": ("fsdp", "expert"),  # only "fsdp" for kernels of experts, see `logical_to_mesh`
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    "layers": None,
    "router": None,
    "vision": None,
    "patch": None,
    "patches": None,
    "act_batch": BATCH_AXES,
    "act_seq": None,
    "act_embed": None,
}


def is_distributed() -> bool:
    """Returns True if the mesh in context has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def device_kind() -> str:
    """Returns the `device_kind` of the mesh in context, else of the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.device_kind
    # `jax_default_device` is a device, the name of a platform, or None for the first backend.
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return default.device_kind
    return jax.devices(default)[0].device_kind


def make_mesh(config: MeshConfig, among: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over `among`, by default over all devices.

    Raises:
      UserError: the product of the axis sizes is not the number of devices.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    devices = jax.device_count() if among is None else len(among)
    known = math.prod(size for size in sizes if size != -1)
    filled = [devices // max(known, 1) if size == -1 else size for size in sizes]
    if sizes.count(-1) > 1 or min(filled) < 1 or math.prod(filled) != devices:
        shape = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise UserError(
            f"config.mesh: expected positive sizes with the product {devices}, the number of "
            f"devices (one may be -1, for the rest), got {shape}"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    # Not `jax.make_mesh`: it cannot split a physical axis of the torus over two mesh axes.
    grid = mesh_utils.create_device_mesh(filled, among, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=types)


def logical_to_mesh(names: PartitionSpec) -> PartitionSpec:
    """Returns the mesh axes for the logical axis names of an array.

    A mesh axis may shard only one dimension. A rule with several mesh axes yields to rules with
    one: `(embed, mlp)` is `(("fsdp", "expert"), "tensor")`, `(expert, embed, mlp)` is
    `("expert", "fsdp", "tensor")`.

    Raises:
      UserError: a name without a rule.
    """
    for name in names:
        if name is not None and name not in RULES:
            raise not_one_of("logical axis", name, RULES)
    axes = [None if name is None else RULES[name] for name in names]
    used = {axis for axis in axes if isinstance(axis, str)}
    return PartitionSpec(*(_unused(axis, used) for axis in axes))


def _unused(axes: str | tuple[str, ...] | None, used: set[str]) -> str | tuple[str, ...] | None:
    if not isinstance(axes, tuple):
        return axes
    unused = tuple(axis for axis in axes if axis not in used)
    return unused[0] if len(unused) == 1 else unused


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Returns the shardings of parameters, from an abstract init with logical axis names."""
    specs = nn.get_partition_spec(boxed)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, logical_to_mesh(spec)),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def check_divisible(mesh: Mesh, boxed: Any, model: str) -> None:
    """Raises UserError for a dimension that its mesh axes do not divide.

    Args:
      boxed: an abstract init with logical axis names.
      model: "student" or "teacher", for the message.
    """
    names, shapes = flatten(nn.get_partition_spec(boxed)), flatten(unbox(boxed))
    for path, spec in names.items():
        for name, axes, size in zip(spec, logical_to_mesh(spec), shapes[path].shape, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            shards = math.prod(mesh.shape[axis] for axis in axes)
            if size % shards:
                origin = " * ".join(f"config.mesh.{axis}" for axis in axes)
                expected = f"a divisor of {size}, the {name} of the {model}'s {path}"
                raise invalid(origin, shards, expected)


def unbox(boxed: Any) -> Any:
    """Removes the logical axis names from parameters or their shapes.

    `nn.unbox` also applies sharding constraints, which fail for `ShapeDtypeStruct`.
    """

    def is_boxed(x: Any) -> bool:
        return isinstance(x, nn.LogicallyPartitioned)

    return jax.tree.map(lambda x: x.value if is_boxed(x) else x, boxed, is_leaf=is_boxed)


def constrain_to_batch_sharding(hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Constrains activations to batch sharding.

    Without this at the entry of each layer, XLA may shard the width like the kernels and all-reduce
    the activations of all samples.
    """
    axes = ("act_batch", "act_seq", "act_embed")
    return nn.with_logical_constraint(hidden, axes, fallback=RulesFallback.RAISE_ERROR)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first dimension over all axes but `tensor`."""
    return NamedSharding(mesh, PartitionSpec(RULES["act_batch"]))


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of the batch dimension."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the numbers of the rows of a batch that are on this process's devices."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (rows,) in slices for row in range(*rows.indices(batch_size))})


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Assembles global arrays from each process's `local_rows` (numpy arrays)."""
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        # Without the global shape, JAX assumes that processes whose devices share a shard (along
        # `tensor`) pass the same rows.
        global_shape = (len(x) * jax.process_count(), *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, global_shape)

    return jax.tree.map(put, batch)
