"""Softmax attention from structure, not from a dense mask.

A dense mask [B, T, S] would be larger than the activations at long T. So most kernels derive what a
query may see from the segments of its row. Which kernel a program uses is decided when it is
traced, from the devices of the mesh in context and from shapes (`kernel_name`):

    cudnn        NVIDIA, half precision: full attention, or one segment a row
    cudnn mask   NVIDIA, half precision: packed rows and prompts of a cache, with a dense mask
    splash       TPU: JAX's Pallas splash attention with segment ids
    blocks       otherwise: blocks of queries in XLA, each with a mask of its own

All agree to rounding at real positions. Outputs of padding are finite and otherwise unspecified.
"""

import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moddistill.distributed.sharding import BATCH_AXES, device_kind, is_distributed

_BLOCK = 512  # queries whose scores exist at one time
_PARTS, _PART = 8, 128  # of a row, at most, and the least number of queries in one
_LANES = 128  # of a TPU's registers; splash attention needs blocks of whole lanes
# Slots of the longest row whose dense mask is worth its memory. In bfloat16 the mask of a row with
# T slots has 2 * T * T bytes: at 8,192 as much as two of its hidden states of width 4,096.
_LONGEST_MASK = 8192


@flax.struct.dataclass
class Structure:
    """Which keys a query sees: those of its own segment, up to its own slot in the row.

    Padding sees its own slot at least, which keeps its softmax finite.

    Attributes:
      query_segments: the number of each query's sample within its row, from 1; 0 is padding.
      key_segments: the same for keys; with a cache, for all of its slots, 0 where they are empty.
      offset: the slot of the first query, with a cache that of each row; 0 without a cache.
      one_segment: whether each row is known to be one sample, padded on the right. Kernels that
        take lengths in place of segments need that.
    """

    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    offset: Int[Array, "*B"]
    one_segment: bool = flax.struct.field(pytree_node=False, default=False)

    def slots(self, length: int) -> Int[Array, "#B T"]:
        """The slots of `length` queries; of one row if they are the same in all."""
        return self.offset.reshape(-1, 1) + jnp.arange(length)[None]


def causal(segments: Int[Array, "B T"], one_segment: bool = False) -> Structure:
    """The structure of rows that attend to themselves, without a cache."""
    return Structure(segments, segments, jnp.zeros((), jnp.int32), one_segment)


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    structure: Structure | None,
) -> Float[Array, "B T N H"]:
    """`softmax(query @ key / sqrt(H)) @ value`; without a structure every query sees every key.

    Groups of N / K query heads share one head of keys and values.
    """
    kernel = kernel_name(query, key, structure)
    if kernel == "blocks":
        return _by_blocks(query, key, value, structure)
    kernels = {"cudnn": _by_cudnn, "cudnn mask": _by_cudnn_mask, "splash": _by_splash}
    return _over_mesh(kernels[kernel], query, key, value, structure)


def kernel_name(query: Any, key: Any, structure: Structure | None) -> str:
    """The kernel of `attend` for arrays or shapes, as listed above.

    cuDNN has no kernel for float32 and none for heads above 128 before Hopper. Its packed layout is
    not used: it is private in JAX, needs Hopper and a static number of segments, and before JAX
    0.12 its key offsets are wrong for grouped heads. With a dense mask it is 4 to 6 times as fast
    as blocks (docs/performance.md). Splash attention needs whole blocks of lanes.
    """
    length, slots, head_dim = query.shape[1], key.shape[1], query.shape[-1]
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if device_kind().startswith("NVIDIA") and half and head_dim <= 128 and head_dim % 8 == 0:
        if length == slots and (structure is None or structure.one_segment):
            return "cudnn"
        return "cudnn mask" if length > 1 and slots <= _LONGEST_MASK else "blocks"
    whole = length == slots and length % _LANES == 0
    if device_kind().startswith("TPU") and structure is not None and whole:
        return "splash"
    return "blocks"


def visible(
    query_segments: Int[Array, "B T"], slots: Int[Array, "#B T"], key_segments: Int[Array, "B S"]
) -> Bool[Array, "B T S"]:
    """The mask of some queries, which are at `slots` of their rows."""
    # Slots in the row or cache, not positions, which restart with every sample of a packed row.
    keys = jnp.arange(key_segments.shape[1])[None, None]
    own = slots[..., None] == keys
    earlier = slots[..., None] >= keys
    same = query_segments[:, :, None] == key_segments[:, None]
    return (earlier & same & (key_segments > 0)[:, None]) | own


def _by_blocks(query: Array, key: Array, value: Array, structure: Structure | None) -> Array:
    """Attention in XLA, one block of queries at a time.

    Scores [B, N, T, S] of a large teacher would be several times its activations. Only those of 512
    queries exist at a time, and the backward pass recomputes them. Without a cache, scores of keys
    after a part of the queries are not computed, of long rows about 0.4 of all scores.
    """
    if structure is None:
        return jax.nn.dot_product_attention(query, key, value)
    length, slots = query.shape[1], structure.slots(query.shape[1])
    has_cache = structure.offset.ndim > 0 or length != key.shape[1]
    whole = _PART if length <= _PARTS * _BLOCK else _BLOCK
    size = length if has_cache else whole * math.ceil(length / _PARTS / whole)

    def of_part(start: int) -> Array:
        end = min(start + size, length)
        seen = key.shape[1] if has_cache else end

        def block(query: Array, segments: Array, slots: Array) -> Array:
            mask = visible(segments, slots, structure.key_segments[:, :seen])
            keys, values = key[:, :seen], value[:, :seen]
            return jax.nn.dot_product_attention(query, keys, values, mask=mask[:, None])

        # The checkpoint saves a block's inputs instead of its scores and softmax.
        block = block if length <= _BLOCK else jax.checkpoint(block)
        arrays = query, structure.query_segments, slots
        return _map_blocks(block, *(x[:, start:end] for x in arrays))

    return jnp.concatenate([of_part(start) for start in range(0, length, size)], axis=1)


def _map_blocks(block: Callable[..., Array], query: Array, segments: Array, slots: Array) -> Array:
    """Returns `block` of all queries, of at most `_BLOCK` at a time."""
    length = query.shape[1]
    if length <= _BLOCK:
        return block(query, segments, slots)

    def split(x: Array) -> Array:
        """[B, T, ...] to [T / block, B, block, ...]; the last block is filled up with zeros."""
        x = jnp.pad(x, [(0, 0), (0, -length % _BLOCK)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, _BLOCK, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    # Filled-up queries are padding of segment 0, cut off below, so no gradient passes through them.
    mixed = jax.lax.map(lambda part: block(*part), tuple(map(split, (query, segments, slots))))
    return jnp.moveaxis(mixed, 0, 1).reshape(len(query), -1, *query.shape[2:])[:, :length]


def _by_cudnn(query: Array, key: Array, value: Array, structure: Structure | None) -> Array:
    """cuDNN's flash attention, by the length of each row."""
    length = query.shape[1]
    if structure is None and length % 2 == 0:
        return _fused(query, key, value)
    if structure is None:
        lengths = jnp.full(len(query), length, jnp.int32)
    else:  # at least 1, since an empty row would have no key at all
        lengths = jnp.sum(structure.query_segments > 0, axis=1, dtype=jnp.int32)
        lengths = jnp.maximum(lengths, 1)
    return _fused(
        query,
        key,
        value,
        is_causal=structure is not None,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
    )


def _by_cudnn_mask(query: Array, key: Array, value: Array, structure: Structure) -> Array:
    """cuDNN's flash attention with a dense mask, which the layers of a model share."""
    slots = structure.slots(query.shape[1])
    mask = visible(structure.query_segments, slots, structure.key_segments)
    odd = [(0, 0), *((0, count % 2) for count in mask.shape[1:])]
    return _fused(query, key, value, mask=jnp.pad(mask, odd)[:, None])


def _fused(query: Array, key: Array, value: Array, **options: Any) -> Array:
    """JAX's attention by cuDNN, which needs even numbers of queries and of keys.

    Odd ones are padded by one, which the options of the caller exclude.
    """

    def even(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    mixed = jax.nn.dot_product_attention(
        even(query), even(key), even(value), implementation="cudnn", **options
    )
    return mixed[:, : query.shape[1]]


def _by_splash(
    query: Array, key: Array, value: Array, structure: Structure, interpret: bool = False
) -> Array:
    """Splash attention with segment ids; `interpret` runs it without a TPU, for tests.

    Padding forms a segment of its own: causal within it, every query sees itself at least.
    """
    # The kernel does not scale scores. It takes one row, heads first; vmap adds the batch axis.
    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    heads_first = (x.swapaxes(1, 2) for x in (scaled, key, value))
    ids = _splash().SegmentIds(structure.query_segments, structure.key_segments)
    kernel = _splash_kernel(query.shape[2], query.shape[1], interpret)
    return jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)


def _splash_kernel(heads: int, length: int, interpret: bool) -> Any:
    """The kernel of one row; blocks above the diagonal are skipped, in both passes."""
    kernels, block = _splash(), max(x for x in (512, 256, 128) if length % x == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    return kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([kernels.CausalMask((length, length))] * heads),
        block_sizes=kernels.BlockSizes(**{f"block_{name}": block for name in names}),
        interpret=interpret,
    )


def _splash() -> ModuleType:
    """An experimental module of JAX that CPUs and GPUs do not import."""
    return importlib.import_module("jax.experimental.pallas.ops.tpu.splash_attention")


def _over_mesh(
    compute: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    structure: Structure | None,
) -> Array:
    """`compute` on each device's rows and heads, since XLA cannot partition a kernel.

    Rows that the mesh does not divide are computed on every device.
    """
    if not is_distributed():
        return compute(query, key, value, structure)
    mesh = jax.sharding.get_abstract_mesh()
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    # Query head n and key head n * K // N are on the same device, since `tensor` divides K.
    rows = BATCH_AXES if len(query) % shards == 0 else None
    heads = PartitionSpec(rows, None, "tensor")
    leaves, tree = jax.tree.flatten(structure)

    def on_device(query: Array, key: Array, value: Array, *leaves: Array) -> Array:
        return compute(query, key, value, jax.tree.unflatten(tree, leaves))

    rest = [PartitionSpec(rows) if x.ndim else PartitionSpec() for x in leaves]
    sharded = jax.shard_map(
        on_device,
        in_specs=(heads, heads, heads, *rest),
        out_specs=heads,
        check_vma=False,
    )
    return sharded(query, key, value, *leaves)
