"""Placement of inference: one device, or the mesh that the parameters are sharded over."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from moddistill.distributed.sharding import RULES, batch_sharding
from moddistill.models.batch import Batch


def params_mesh(params: dict[str, Any]) -> Mesh | None:
    """Returns the mesh that parameters are sharded over; None if they are on one device."""
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


@contextlib.contextmanager
def mesh_context(mesh: Mesh | None) -> Iterator[None]:
    """Sets the mesh and the logical axis rules; without a mesh, does nothing."""
    if mesh is None:
        # Without axis rules, Flax's logical constraints are no-ops.
        yield
        return
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
        yield


def put_rows(mesh: Mesh | None, batch: Batch) -> Batch:
    """Returns arrays sharded by row over the mesh, from the same batch in every process."""
    if mesh is None:
        return batch
    sharding = batch_sharding(mesh)
    # Each process supplies the shards of its own devices only.
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), batch
    )
