"""Mixture of experts: routing, capacity, statistics, and the layer.

Routing follows LLaVA-MoD (softmax over all experts, top k) without the noise on the second choice
that its DeepSpeed router adds even at inference. By default nothing is dropped, so a token's
output never depends on the other tokens of the batch.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from moddistill.config import Dispatch, ExpertConfig
from moddistill.errors import UserError, nearest
from moddistill.models.compute import ComputeConfig
from moddistill.models.layers import SwiGLU, init_fan_in, init_normal, init_zeros
from moddistill.models.moe.expert_parallel import mix_experts, mix_on_one_device
from moddistill.models.moe.router import (
    RouterStats,
    capacity_slots,
    normalise,
    router_stats,
    top_k_routing,
    within_capacity,
)

DISPATCHES = typing.get_args(Dispatch)
MAX_EXPERTS = 1_000


def check_moe(config: ExpertConfig) -> ExpertConfig:
    """The config with `norm_topk_prob` decided; raises UserError for values without a meaning."""
    if not 1 <= config.num_experts <= MAX_EXPERTS:
        raise UserError(f"moe.num_experts is {config.num_experts}; accepted: 1 to {MAX_EXPERTS:,}")
    if not 1 <= config.top_k <= config.num_experts:
        raise UserError(
            f"moe.top_k is {config.top_k}; accepted: 1 to moe.num_experts ({config.num_experts})"
        )
    if config.dispatch not in DISPATCHES:
        raise UserError(
            f"moe.dispatch is {config.dispatch!r}; accepted: {', '.join(DISPATCHES)}"
            + nearest(config.dispatch, DISPATCHES)
        )
    if not 0 < config.capacity_factor <= 1e6:
        raise UserError(
            f"moe.capacity_factor is {config.capacity_factor}; accepted: above 0, at most 1,000,000"
        )
    if config.moe_intermediate_size < 0:
        raise UserError(
            f"moe.moe_intermediate_size is {config.moe_intermediate_size}; accepted: the width of "
            "an expert, or 0 for the dense layer's"
        )
    norm = config.top_k >= 2 if config.norm_topk_prob is None else config.norm_topk_prob
    return dataclasses.replace(config, norm_topk_prob=norm)


class MoE(nn.Module):
    """A router and `num_experts` gated feed-forward layers, in place of one.

    `width` is the feed-forward width of a dense layer, and of the experts unless they have another.
    """

    config: ExpertConfig
    width: int
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        valid: Bool[Array, "B T"],
        is_image: Bool[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        config = check_moe(self.config)
        tokens = hidden.reshape(-1, hidden.shape[-1])
        valid, is_image = valid.reshape(-1), is_image.reshape(-1)
        logits = self._router(tokens)
        experts, weights = top_k_routing(
            jax.nn.softmax(logits),
            config.top_k,
            config.norm_topk_prob and config.dispatch == "dropless",
        )
        keep = jnp.broadcast_to(valid[:, None], experts.shape)
        if config.dispatch == "capacity":
            count = jnp.sum(valid.astype(jnp.float32))
            slots = capacity_slots(count, config.num_experts, config.top_k, config.capacity_factor)
            keep = within_capacity(experts, valid, config.num_experts, slots)
            # A lone survivor gets the whole weight, as in the reference.
            weights = weights * keep
            weights = normalise(weights) if config.norm_topk_prob else weights
        # The one token of an init cannot be spread over devices.
        mix = functools.partial(mix_experts, transport=self.compute.expert_transport)
        mix = mix_on_one_device if self.is_initializing() else mix
        mixed = mix(
            tokens.astype(self.compute.dtype), weights, experts, keep, self._experts(tokens)
        )
        mixed = mixed.reshape(hidden.shape)
        if config.residual:
            mixed = self._add_residual(hidden, mixed)
        return mixed, router_stats(logits, experts, keep, valid, is_image)

    def _router(self, tokens: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """Router logits; float32 throughout, since bfloat16 flips near ties."""
        shape = (tokens.shape[-1], self.config.num_experts)
        kernel = self.param("router", init_normal("embed", "router"), shape, jnp.float32)
        return jnp.einsum("TD,DE->TE", tokens.astype(jnp.float32), kernel.astype(jnp.float32))

    def _experts(self, tokens: Float[Array, "T D"]) -> dict[str, Array]:
        config = self.config
        num, width = config.num_experts, tokens.shape[-1]
        mlp = config.moe_intermediate_size or self.width
        shapes = {
            "gate": ((num, width, mlp), ("embed",), ("mlp",)),
            "up": ((num, width, mlp), ("embed",), ("mlp",)),
            "down": ((num, mlp, width), ("mlp",), ("embed",)),
        }
        experts = {}
        for name, (shape, inputs, outputs) in shapes.items():
            init = init_fan_in(inputs, outputs, batch=("expert",))
            experts[name] = self.param(f"experts_{name}", init, shape, jnp.float32)
        return {name: kernel.astype(self.compute.dtype) for name, kernel in experts.items()}

    def _add_residual(
        self, hidden: Float[Array, "B T D"], mixed: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Residual MoE: a learned blend with one dense layer (Rajbhandari et al. 2022)."""
        width = hidden.shape[-1]
        kernel = self.param("blend", init_normal("embed", "router"), (width, 2), jnp.float32)
        bias = self.param("blend_bias", init_zeros("router"), (2,), jnp.float32)
        logits = jnp.einsum("BTD,DE->BTE", hidden.astype(jnp.float32), kernel.astype(jnp.float32))
        share = jax.nn.softmax(logits + bias.astype(jnp.float32)[None, None]).astype(
            self.compute.dtype
        )
        dense = SwiGLU(self.width, self.compute.dtype, name="residual")(hidden)
        return share[..., :1] * mixed + share[..., 1:] * dense
