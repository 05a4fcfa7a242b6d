"""Dense to sparse: expert layers made of copies of the trained feed-forward layer.

With weights renormalised over the chosen experts, as is usual for top_k >= 2, the sparse model
computes what the dense one did, to rounding, whatever its routers say (Komatsuzaki et al. 2022).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moddistill.config import MoeConfig
from moddistill.models.layer_plan import stack, unstack
from moddistill.models.moe import check_moe
from moddistill.models.vlm import ModelConfig


def upcycle_config(config: ModelConfig, moe: MoeConfig) -> ModelConfig:
    """The sparse architecture; ValueError if the model is sparse or `moe` makes no sense."""
    if config.decoder.moe is not None:
        raise ValueError(
            f"the model already has {config.decoder.moe.num_experts} experts in layers "
            f"{config.decoder.moe_layers}; only a dense model can be upcycled"
        )
    decoder = dataclasses.replace(config.decoder, moe=check_moe(moe))
    decoder.plan  # noqa: B018  raises for a placement that does not fit
    return dataclasses.replace(config, decoder=decoder)


def upcycle(params: dict[str, Any], config: ModelConfig, rng: jax.Array) -> dict[str, Any]:
    """Parameters for the sparse `config` from those of the dense model it was made from.

    Experts are copies; routers are normal with deviation 0.02; a residual layer is the original one
    with an even blend. Arrays keep their dtype, routers are float32.
    """
    decoder = config.decoder
    dense_plan = dataclasses.replace(decoder, moe=None).plan
    names = [f"segment_{i}" for i in range(len(dense_plan))]
    layers = unstack({name: params["decoder"][name] for name in names}, dense_plan)
    for i in decoder.moe_layers:
        layers[i] = _upcycle_layer(layers[i], decoder.moe, jax.random.fold_in(rng, i))
    rest = {name: leaf for name, leaf in params["decoder"].items() if name not in names}
    return {**params, "decoder": {**rest, **stack(layers, decoder.plan)}}


def _upcycle_layer(layer: dict[str, Any], moe: MoeConfig, rng: jax.Array) -> dict[str, Any]:
    mlp = layer["mlp"]
    width = mlp["gate"]["kernel"].shape[0]
    experts = {
        f"experts_{name}": jnp.broadcast_to(
            leaf["kernel"], (moe.num_experts, *leaf["kernel"].shape)
        )
        for name, leaf in mlp.items()
    }
    experts["router"] = 0.02 * jax.random.normal(rng, (width, moe.num_experts), jnp.float32)
    if moe.residual:
        experts["residual"] = mlp
        experts["blend"] = jnp.zeros((width, 2), jnp.float32)
        experts["blend_bias"] = jnp.zeros(2, jnp.float32)
    return {name: leaf for name, leaf in layer.items() if name != "mlp"} | {"moe": experts}
