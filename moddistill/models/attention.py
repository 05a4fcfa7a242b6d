"""Multi-head attention with grouped keys and values, and an explicit cache for decoding."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from moddistill.models.layers import DType, Linear, rotary

Cache = dict[str, Array]  # key and value, each [B, S, K, H]


class Attention(nn.Module):
    """Attention for the decoder (rotary, biased q/k/v) and the tower (biased everywhere).

    With a cache, this call's keys and values are written from slot `start` on and all slots are
    attended to, as far as `mask` allows.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float | None
    out_bias: bool
    dtype: DType

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
            features = (heads, self.head_dim)
            return Linear(features, ("embed",), (axis, "head_dim"), True, self.dtype, name=name)

        query = project("query", self.heads, "heads")(hidden)
        key = project("key", self.kv_heads, "kv_heads")(hidden)
        value = project("value", self.kv_heads, "kv_heads")(hidden)
        if self.rope_theta is not None:
            query = rotary(query, positions, self.rope_theta)
            key = rotary(key, positions, self.rope_theta)
        if cache is not None:
            key = _write(cache["key"], key, start)
            value = _write(cache["value"], value, start)
            cache = {"key": key, "value": value}
        mixed = jax.nn.dot_product_attention(
            query, key, value, mask=None if mask is None else mask[:, None]
        )
        out = Linear(
            hidden.shape[-1:],
            ("heads", "head_dim"),
            ("embed",),
            self.out_bias,
            self.dtype,
            name="out",
        )
        return out(mixed), cache


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
