"""How many rows fit: answers in progress, in the memory that the parameters leave."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from moddistill.distributed.processes import broadcast_from_main
from moddistill.distributed.sharding import num_batch_shards
from moddistill.inference.placement import params_mesh
from moddistill.models.compute import ComputeConfig
from moddistill.models.decoder import DecoderConfig, init_cache
from moddistill.models.vlm import Vlm

MAX_ROWS = 256
MEMORY_SHARE = 0.8  # of the free memory; the rest is for images, logits and fragmentation
CPU_BYTES = 4 * 2**30  # free memory assumed for all devices of a CPU, which reports none


def batch_rows(model: Vlm, params: dict[str, Any], slots: int, prompts: int) -> int:
    """Returns the rows that fit in the memory left by the parameters, at most `prompts`.

    Args:
      slots: positions of a row, prompt and answer.
    """
    mesh = params_mesh(params)
    shards, tensor = (num_batch_shards(mesh), mesh.shape["tensor"]) if mesh else (1, 1)
    devices = mesh.local_devices if mesh else list(jax.tree.leaves(params)[0].devices())
    # Heads and intermediate widths are sharded over `tensor`, rows over all other axes.
    row_bytes = bytes_per_row(model.config.decoder, model.compute, slots) // tensor
    # Shards are equal, so the device with the least free memory decides.
    budget = min(memory_budget(device.memory_stats()) for device in devices)
    rows = fitting_rows(row_bytes, budget, shards, prompts)
    # Free memory may differ between processes, which must agree on the shape of a batch.
    return broadcast_from_main(rows) if mesh else rows


def bytes_per_row(config: DecoderConfig, compute: ComputeConfig, slots: int) -> int:
    """Returns the bytes of one row with `slots` positions, prompt and answer.

    The cache counts twice, since that of new prompts exists in addition to that of all rows. The
    activations are those of one layer at all positions: residual stream, query, key, value and
    feed-forward. Beginnings (`table.Table`) are not counted: at most an eighth of the rows, or one
    for each shard.
    """
    experts = config.moe.top_k if config.moe else 1
    # The factor 3 is `gate`, `up` and their product, once for each expert of a token.
    values = 8 * config.hidden_size + 3 * experts * config.intermediate_size
    activations = slots * values * jnp.dtype(compute.dtype).itemsize
    return 2 * cache_bytes_per_row(config, compute, slots) + activations


def cache_bytes_per_row(config: DecoderConfig, compute: ComputeConfig, slots: int) -> int:
    """Returns the bytes of keys and values of one row with `slots` positions."""
    arrays = jax.eval_shape(lambda: jax.tree.leaves(init_cache(config, compute, 1, slots).layers))
    return sum(x.size * x.dtype.itemsize for x in arrays)


def memory_budget(memory_stats: dict[str, int] | None) -> int:
    """Returns the bytes that rows may take on a device with these statistics."""
    if memory_stats and "bytes_limit" in memory_stats:
        free = memory_stats["bytes_limit"] - memory_stats["bytes_in_use"]
    else:
        free = CPU_BYTES // jax.local_device_count()
    return int(free * MEMORY_SHARE)


def fitting_rows(row_bytes: int, budget: int, shards: int, num_prompts: int) -> int:
    """Returns the largest multiple of `shards` that fits the budget, at most `MAX_ROWS`.

    Args:
      row_bytes: memory of one row on one device.
      budget: bytes on one device.
      shards: groups of devices that rows are spread over; each gets at least one row.
      num_prompts: the prompts in total; rows beyond them would be filler.
    """
    per_shard = min(budget // row_bytes, MAX_ROWS // shards, math.ceil(num_prompts / shards))
    return shards * max(per_shard, 1)
