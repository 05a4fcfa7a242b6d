"""Multi-head attention with grouped keys and values, and an explicit cache for decoding."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from moddistill.distributed.sharding import device_kind
from moddistill.models.layers import DType, Linear, RMSNorm, rotary

Cache = dict[str, Array]  # key and value, each [B, S, K, H]
_QUERIES = 512


class Attention(nn.Module):
    """Attention for the decoder (rotary) and the tower (biased everywhere).

    With `qk_norm_eps`, every head of query and key is normalised before it is turned (Qwen3).

    With a cache, this call's keys and values are written from slot `start` on and all slots are
    attended to, as far as `mask` allows.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float | None
    out_bias: bool
    dtype: DType
    qkv_bias: bool = True
    qk_norm_eps: float | None = None

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        mask: Bool[Array, "B T S"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        start: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        def project(name: str, heads: int, axis: str) -> Linear:
            features, axes = (heads, self.head_dim), (axis, "head_dim")
            return Linear(features, ("embed",), axes, self.qkv_bias, self.dtype, name=name)

        query = project("query", self.heads, "heads")(hidden)
        key = project("key", self.kv_heads, "kv_heads")(hidden)
        value = project("value", self.kv_heads, "kv_heads")(hidden)
        if self.qk_norm_eps is not None:
            query = RMSNorm(self.qk_norm_eps, "head_dim", name="query_norm")(query)
            key = RMSNorm(self.qk_norm_eps, "head_dim", name="key_norm")(key)
        if self.rope_theta is not None:
            query = rotary(query, positions, self.rope_theta)
            key = rotary(key, positions, self.rope_theta)
        if cache is not None:
            key = _write(cache["key"], key, start)
            value = _write(cache["value"], value, start)
            cache = {"key": key, "value": value}
        mixed = attend(query, key, value, mask)
        out = Linear(
            hidden.shape[-1:],
            ("heads", "head_dim"),
            ("embed",),
            self.out_bias,
            self.dtype,
            name="out",
        )
        return out(mixed), cache


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"] | None,
) -> Float[Array, "B T N H"]:
    """Softmax attention: cuDNN's fused one where it can be had, else in blocks of queries.

    Scores [B, N, T, S] of a large teacher would be several times its activations; a block of 512
    queries has a fraction of them at a time, and makes them again for the gradient.
    """
    where = None if mask is None else mask[:, None]
    if _cudnn_serves(query, key, mask):
        return _by_cudnn(query, key, value, where)
    blocks, rest = divmod(query.shape[1], _QUERIES)
    if mask is None or blocks < 2 or rest:
        return jax.nn.dot_product_attention(query, key, value, mask=where)

    @jax.checkpoint
    def block(part: tuple[Array, Array]) -> Array:
        return jax.nn.dot_product_attention(part[0], key, value, mask=part[1][:, None])

    def cut(x: Array) -> Array:
        return x.reshape(len(x), blocks, _QUERIES, *x.shape[2:]).swapaxes(0, 1)

    mixed = jax.lax.map(block, (cut(query), cut(mask)))
    return mixed.swapaxes(0, 1).reshape(query.shape)


def _cudnn_serves(query: Array, key: Array, mask: Array | None) -> bool:
    """Whether the devices are NVIDIA's, and cuDNN has a kernel for these shapes on all of them.

    It has none for float32, for heads above 128 before Hopper, and for gradients at odd lengths,
    which without a mask are filled up.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    head = query.shape[-1] <= 128 and query.shape[-1] % 8 == 0
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    return half and head and (even or mask is None) and device_kind().startswith("NVIDIA")


def _by_cudnn(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    """One more position, which nobody sees, makes the odd length of a tower even."""
    fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    length = query.shape[1]
    if mask is not None or length % 2 == 0:
        return fused(query, key, value, mask=mask)
    seen = jnp.full(len(query), length, jnp.int32)  # devices get it whole, so all must be equal
    filled = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
    return fused(*filled, query_seq_lengths=seen, key_value_seq_lengths=seen)[:, :length]


def _write(slots: Array, new: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis=1)


def causal_mask(
    segments: Int[Array, "B T"],
) -> Bool[Array, "B T T"]:
    """True where a position may look: not ahead, and only inside its own segment; 0 is padding.

    Padding sees itself alone, which keeps its softmax finite.
    """
    length = segments.shape[1]
    behind = jnp.tril(jnp.ones((length, length), bool))[None]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    return (behind & same) | jnp.eye(length, dtype=bool)[None]
