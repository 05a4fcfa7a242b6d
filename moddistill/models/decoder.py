"""The Qwen1.5 / Qwen2 / Qwen3 decoder, dense or with expert layers.

Pre-norm layers with RMSNorm, rotary grouped-query attention and SwiGLU, scanned over the segments
of the layer plan. Qwen3 normalises query and key heads in place of their biases. At image positions
projected vision features replace the embeddings.
"""

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from moddistill.config import ExpertConfig
from moddistill.distributed.sharding import constrain_to_batch_sharding
from moddistill.models.attention import Attention
from moddistill.models.attention_kernels import Structure
from moddistill.models.compute import ComputeConfig
from moddistill.models.kv_cache import KeyValues, KVCache
from moddistill.models.layer_plan import Plan, make_plan, moe_layers, separate
from moddistill.models.layers import (
    RMSNorm,
    SwiGLU,
    init_normal,
    rematerialised,
)
from moddistill.models.moe.layer import MoE
from moddistill.models.moe.router import RouterStats
from moddistill.models.quantization import dequantize
from moddistill.models.vocabulary import IdRanges


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of the decoder; `vocab_size` counts embedding rows, `real_ids` are tokens."""

    vocab_size: int
    real_ids: IdRanges
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    moe: ExpertConfig | None = None

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the expert layers."""
        return moe_layers(self.moe.placement, self.num_layers) if self.moe else ()

    @property
    def plan(self) -> Plan:
        return make_plan([i in self.moe_layers for i in range(self.num_layers)])

    def plan_of(self, compute: ComputeConfig) -> Plan:
        """The plan of the parameters and of the cache of a computation."""
        return self.plan if compute.stacked else separate(self.plan)


@flax.struct.dataclass
class Context:
    """Inputs that are the same for every layer.

    Attributes:
      valid: false at padding, which experts neither compute nor count.
      is_image: true at image positions, for the experts' statistics.
    """

    positions: Int[Array, "B T"]
    structure: Structure
    valid: Bool[Array, "B T"]
    is_image: Bool[Array, "B T"]


class DecoderLayer(nn.Module, kw_only=True):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, where the MLP may be experts."""

    config: DecoderConfig
    has_experts: bool
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B T D"], context: Context, cache: KeyValues | None
    ) -> tuple[Float[Array, "B T D"], RouterStats | None, KeyValues | None]:
        config = self.config
        attention = Attention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            qkv_bias=config.qkv_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            dtype=self.compute.dtype,
            name="attention",
        )
        normed = RMSNorm(config.norm_eps, name="attention_norm")(hidden)
        mixed, cache = attention(normed, context.structure, context.positions, cache)
        hidden = hidden + mixed
        normed = RMSNorm(config.norm_eps, name="mlp_norm")(hidden)
        if self.has_experts:
            experts = MoE(
                config=config.moe,
                intermediate_size=config.intermediate_size,
                compute=self.compute,
                name="moe",
            )
            mixed, stats = experts(normed, context.valid, context.is_image)
        else:
            mixed, stats = (
                SwiGLU(config.intermediate_size, self.compute.dtype, name="mlp")(normed),
                None,
            )
        return hidden + mixed, stats, cache


class LayerGroup(nn.Module):
    """The layers of one repeat of a segment: the body of its scan."""

    config: DecoderConfig
    pattern: tuple[bool, ...]
    compute: ComputeConfig

    @nn.compact
    def __call__(self, hidden, context, caches):
        # Inside the scan, where XLA would otherwise choose a sharding for the carry.
        hidden = constrain_to_batch_sharding(hidden)
        all_stats = []
        new_caches = []
        for j, has_experts in enumerate(self.pattern):
            layer = DecoderLayer(
                config=self.config, has_experts=has_experts, compute=self.compute, name=f"block_{j}"
            )
            hidden, stats, cache = layer(hidden, context, caches[j] if caches else None)
            all_stats += [stats] if has_experts else []
            new_caches.append(cache)
        return hidden, (all_stats, new_caches if caches else None)


class Decoder(nn.Module):
    """From tokens and projected image features to final hidden states and the head's matrix."""

    config: DecoderConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        image_hidden: Float[Array, "B T D"] | None,
        context: Context,
        cache: list[list[KeyValues]] | None,
    ) -> tuple[
        Float[Array, "B T D"], Float[Array, "V D"], RouterStats | None, list[list[KeyValues]] | None
    ]:
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        table = self.param("embedding", init_normal("vocab", "embed"), shape, jnp.float32)
        # `clip`, since the id of <image> may be beyond the table. Its row is replaced below.
        hidden = jnp.take(table, tokens, axis=0, mode="clip").astype(self.compute.dtype)
        if image_hidden is not None:
            hidden = jnp.where(context.is_image[..., None], image_hidden, hidden)
        stats = []
        new_cache = []
        for i, segment in enumerate(config.plan_of(self.compute)):
            # Parameters and cache are stacked along axis 0 and sliced by the scan; the context is
            # the same for all repeats.
            scan = nn.scan(
                self._layer_group(),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, 0),
                length=segment.repeats,
                unroll=segment.repeats if self.compute.unroll else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            segment_module = scan(config, segment.pattern, self.compute, name=f"segment_{i}")
            hidden, (segment_stats, segment_cache) = segment_module(
                hidden, context, cache[i] if cache else None
            )
            stats += [_layer_major(segment_stats)] if segment_stats else []
            new_cache.append(segment_cache)
        hidden = RMSNorm(config.norm_eps, name="norm")(hidden)
        if config.tie_word_embeddings:
            head = table
        else:
            head = self.param("head", init_normal("vocab", "embed"), shape, jnp.float32)
        router = jax.tree.map(lambda *x: jnp.concatenate(x), *stats) if stats else None
        return hidden, head.astype(self.compute.dtype), router, new_cache if cache else None

    def _layer_group(self) -> Any:
        """The body of a scan; it dequantizes its own parameters, so that one layer's are in use."""
        group = LayerGroup
        # Inside remat, so that dequantized kernels are recomputed rather than saved.
        if self.compute.quantized_layers:
            ready = functools.partial(dequantize, dtype=self.compute.dtype)
            group = nn.map_variables(group, "params", trans_in_fn=ready)
        return rematerialised(group, self.compute.remat)


def _layer_major(stats: list[RouterStats]) -> RouterStats:
    """Interleaves statistics [R, ...] of a group's expert layers to layer order [layers, ...]."""

    def interleave(*leaves):
        # [R, n, ...] to [R * n, ...] for n expert layers in the pattern, as layers repeat it.
        return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])

    return jax.tree.map(interleave, *stats)


def init_cache(config: DecoderConfig, compute: ComputeConfig, batch: int, slots: int) -> KVCache:
    """An empty cache of `batch` rows, in the dtype of activations."""

    def empty(repeats: int) -> KeyValues:
        shape = (repeats, batch, slots, config.num_kv_heads, config.head_dim)
        return {name: jnp.zeros(shape, compute.dtype) for name in ("key", "value")}

    plan = config.plan_of(compute)
    layers = [[empty(segment.repeats) for _ in segment.pattern] for segment in plan]
    return KVCache(layers, jnp.zeros((batch, slots), jnp.int32), jnp.zeros(batch, jnp.int32))
