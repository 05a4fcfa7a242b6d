"""Device mesh, and one table from logical axis names to mesh axes.

Parameters carry logical names from their creation; an unknown name is an error. Without this table
a misspelt one would silently be replicated.
"""

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
from moddistill.errors import UserError, nearest
from moddistill.params import flatten

MESH_AXES = ("data", "fsdp", "expert", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # along which samples are spread

RULES: dict[str, str | tuple[str, ...] | None] = {
    "embed": ("fsdp", "expert"),  # for the kernels of experts "fsdp" alone
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
    """Whether the mesh of the context has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def device_kind() -> str:
    """The backend's name for the devices of the mesh in context, else for the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.device_kind
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return default.device_kind
    return jax.devices(default)[0].device_kind  # of a platform's name, or of the first backend


def make_mesh(config: MeshConfig, among: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or over those given.

    Raises:
      UserError: if the axis sizes do not multiply to their number.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    devices = jax.device_count() if among is None else len(among)
    known = math.prod(size for size in sizes if size != -1)
    filled = [devices // max(known, 1) if size == -1 else size for size in sizes]
    if sizes.count(-1) > 1 or min(filled) < 1 or math.prod(filled) != devices:
        shape = ", ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
        raise UserError(
            f"mesh {shape} does not fit {devices} devices; accepted: positive sizes whose product "
            "is their number, one of them -1 for what is left"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    # As `jax.make_mesh`, which does not let an axis take a part of a TPU's physical one.
    placed = mesh_utils.create_device_mesh(filled, among, allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=types)


def resolve(names: PartitionSpec) -> PartitionSpec:
    """Mesh axes for an array's logical names; UserError for a name the table does not have."""
    for name in names:
        if name is not None and name not in RULES:
            raise UserError(
                f"logical axis {name!r} is unknown; accepted: {', '.join(RULES)}"
                + nearest(name, RULES)
            )
    axes = [None if name is None else RULES[name] for name in names]
    taken = {axis for axis in axes if isinstance(axis, str)}
    return PartitionSpec(*(_free(axis, taken) for axis in axes))


def _free(axes: str | tuple[str, ...] | None, taken: set[str]) -> str | tuple[str, ...] | None:
    """Of several mesh axes those that no other dimension has to itself."""
    if not isinstance(axes, tuple):
        return axes
    free = tuple(axis for axis in axes if axis not in taken)
    return free[0] if len(free) == 1 else free


def param_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Shardings of the parameters of an abstract init whose leaves carry logical names."""
    specs = nn.get_partition_spec(boxed)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, resolve(spec)),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def check_divisible(mesh: Mesh, boxed: Any, whose: str) -> None:
    """Raises UserError for a parameter that cannot be cut into equal parts along the mesh.

    Args:
      boxed: an abstract init whose leaves carry logical names.
      whose: the model, for the message.
    """
    names, shapes = flatten(nn.get_partition_spec(boxed)), flatten(unbox(boxed))
    for path, spec in names.items():
        for name, axes, size in zip(spec, resolve(spec), shapes[path].shape, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            pieces = math.prod(mesh.shape[axis] for axis in axes)
            if size % pieces:
                said = " * ".join(f"config.mesh.{axis}" for axis in axes)
                raise UserError(
                    f"{said} is {pieces}, along which the {whose}'s {path} has {size} {name}; "
                    f"accepted: a divisor of {size}"
                )


def unbox(boxed: Any) -> Any:
    """Parameters, or their shapes, without the logical names.

    Flax's own `unbox` also constrains the layout, which shapes do not have.
    """

    def is_boxed(x: Any) -> bool:
        return isinstance(x, nn.LogicallyPartitioned)

    return jax.tree.map(lambda x: x.value if is_boxed(x) else x, boxed, is_leaf=is_boxed)


def constrain_to_batch_sharding(hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The same, whole samples on each device.

    Said at the entry of every layer: a compiler left to itself may cut widths as the kernels are
    cut, and then adds up the activations of all samples on all devices.
    """
    axes = ("act_batch", "act_seq", "act_embed")
    return nn.with_logical_constraint(hidden, axes, fallback=RulesFallback.RAISE_ERROR)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Samples spread over all axes but `tensor`."""
    return NamedSharding(mesh, PartitionSpec(RULES["act_batch"]))


def num_batch_shards(mesh: Mesh) -> int:
    """Among how many groups of devices samples are spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """This process's samples (numpy arrays) as parts of global arrays."""
    sharding = batch_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        # Said, since JAX takes samples of two processes for one where they share a place.
        whole = (len(x) * jax.process_count(), *x.shape[1:])
        return jax.make_array_from_process_local_data(sharding, x, whole)

    return jax.tree.map(put, batch)
