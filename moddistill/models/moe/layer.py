"""The mixture-of-experts layer.

Routing follows LLaVA-MoD (softmax over all experts, top k) without the noise on the second choice
that its DeepSpeed router adds even at inference. By default no assignment is dropped, so that a
token's output does not depend on the other tokens of the batch.
"""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from moddistill.config import Dispatch, ExpertConfig
from moddistill.errors import invalid, not_one_of
from moddistill.models.compute import ComputeConfig
from moddistill.models.layers import SwiGLU, init_fan_in, init_normal, init_zeros
from moddistill.models.moe.expert_parallel import mix_experts, mix_on_one_device
from moddistill.models.moe.router import (
    RouterStats,
    capacity_slots,
    normalise,
    router_logits,
    router_stats,
    top_k_routing,
    within_capacity,
)

DISPATCHES = typing.get_args(Dispatch)
MAX_EXPERTS = 1_000


def check_moe(config: ExpertConfig) -> ExpertConfig:
    """The config with `norm_topk_prob` resolved.

    Raises:
      UserError: a value out of range or outside an enumeration.
    """
    if not 1 <= config.num_experts <= MAX_EXPERTS:
        raise invalid("moe.num_experts", config.num_experts, f"1 to {MAX_EXPERTS:,}")
    if not 1 <= config.top_k <= config.num_experts:
        expected = f"1 to moe.num_experts ({config.num_experts})"
        raise invalid("moe.top_k", config.top_k, expected)
    if config.dispatch not in DISPATCHES:
        raise not_one_of("moe.dispatch", config.dispatch, DISPATCHES)
    if not 0 < config.capacity_factor <= 1e6:
        raise invalid("moe.capacity_factor", config.capacity_factor, "> 0 and <= 1,000,000")
    if config.moe_intermediate_size < 0:
        expected = "the width of an expert, or 0 for the dense layer's"
        raise invalid("moe.moe_intermediate_size", config.moe_intermediate_size, expected)
    norm = config.top_k >= 2 if config.norm_topk_prob is None else config.norm_topk_prob
    return dataclasses.replace(config, norm_topk_prob=norm)


class MoE(nn.Module, kw_only=True):
    """A router and `num_experts` gated feed-forward layers in place of a dense one.

    `intermediate_size` is that of the dense layer, and of experts without one of their own.

    1. Router logits [T, E] in float32 and their softmax.
    2. The top k experts of each token, with weights [T, k].
    3. With `dispatch="capacity"`, assignments beyond an expert's slots are dropped.
    4. `sum_j weights[t, j] * expert_{e(t, j)}(x_t)`, computed where the experts are.
    """

    config: ExpertConfig
    intermediate_size: int
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
        shape = (tokens.shape[-1], config.num_experts)
        kernel = self.param("router", init_normal("embed", "router"), shape, jnp.float32)
        logits = router_logits(tokens, kernel)
        probs = jax.nn.softmax(logits)
        experts, weights = top_k_routing(
            probs,
            config.top_k,
            config.norm_topk_prob and config.dispatch == "dropless",
        )
        keep = jnp.broadcast_to(valid[:, None], experts.shape)
        if config.dispatch == "capacity":
            count = jnp.sum(valid.astype(jnp.float32))
            slots = capacity_slots(count, config.num_experts, config.top_k, config.capacity_factor)
            keep = within_capacity(experts, valid, config.num_experts, slots)
            # Weights are normalised over the assignments that are left, as in the reference.
            weights = weights * keep
            weights = normalise(weights) if config.norm_topk_prob else weights
        # The single token of an initialisation cannot be sharded over devices.
        mix = functools.partial(mix_experts, transport=self.compute.expert_transport)
        mix = mix_on_one_device if self.is_initializing() else mix
        mixed = mix(
            tokens.astype(self.compute.dtype), weights, experts, keep, self._experts(tokens)
        )
        mixed = mixed.reshape(hidden.shape)
        if config.residual:
            mixed = self._add_residual(hidden, mixed)
        stats = router_stats(logits, experts, keep, valid, is_image)
        return mixed, stats.replace(token_probs=probs) if self.compute.token_routing else stats

    def _experts(self, tokens: Float[Array, "T D"]) -> dict[str, Array]:
        config = self.config
        num, width = config.num_experts, tokens.shape[-1]
        mlp = config.moe_intermediate_size or self.intermediate_size
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
        dense = SwiGLU(self.intermediate_size, self.compute.dtype, name="residual")(hidden)
        return share[..., :1] * mixed + share[..., 1:] * dense
