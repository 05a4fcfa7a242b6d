"""Multi-head attention with grouped keys and values, and an explicit cache for decoding."""

from flax import linen as nn
from jaxtyping import Array, Float, Int

from moddistill.models.attention_kernels import Structure, attend
from moddistill.models.kv_cache import KeyValues, write_slots
from moddistill.models.layers import DType, Linear, RMSNorm, rotary


class Attention(nn.Module, kw_only=True):
    """Attention of the decoder (rotary, causal) and of the vision encoder (biases, full).

    With a cache, keys and values are written to its slots from the structure's offset on, and
    queries attend to all slots that the structure lets them see.

    Attributes:
      num_heads: of the query; `num_kv_heads` divides it.
      rope_theta: base of the rotary frequencies; None without rotary positions.
      qk_norm_eps: RMS-normalises each query and key head before RoPE (Qwen3), unless None.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: DType
    rope_theta: float | None = None
    qkv_bias: bool = True
    out_bias: bool = False
    qk_norm_eps: float | None = None

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        structure: Structure | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: KeyValues | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        def project(name: str, heads: int, axis: str) -> Linear:
            return Linear(
                features=(heads, self.head_dim),
                inputs=("embed",),
                outputs=(axis, "head_dim"),
                use_bias=self.qkv_bias,
                dtype=self.dtype,
                name=name,
            )

        query = project("query", self.num_heads, "heads")(hidden)
        key = project("key", self.num_kv_heads, "kv_heads")(hidden)
        value = project("value", self.num_kv_heads, "kv_heads")(hidden)
        if self.qk_norm_eps is not None:
            query = RMSNorm(self.qk_norm_eps, "head_dim", name="query_norm")(query)
            key = RMSNorm(self.qk_norm_eps, "head_dim", name="key_norm")(key)
        if self.rope_theta is not None:
            query = rotary(query, positions, self.rope_theta)
            key = rotary(key, positions, self.rope_theta)
        if cache is not None:
            key = write_slots(cache["key"], key, structure.offset)
            value = write_slots(cache["value"], value, structure.offset)
            cache = {"key": key, "value": value}
        mixed = attend(query, key, value, structure)
        out = Linear(
            features=hidden.shape[-1:],
            inputs=("heads", "head_dim"),
            outputs=("embed",),
            use_bias=self.out_bias,
            dtype=self.dtype,
            name="out",
        )
        return out(mixed), cache
