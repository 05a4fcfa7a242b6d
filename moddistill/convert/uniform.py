"""Exports in which every layer is sparse, for engines that know no others.

A dense layer becomes equal experts with a router of zeros. Whichever experts a token goes to, it
gets their common output: router weights that sum to one leave it as it is. Without
`norm_topk_prob` each weight is 1 / num_experts, so `down` is multiplied by num_experts / top_k.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from moddistill.convert.rules import MappedTensor, Transform
from moddistill.errors import UserError, invalid
from moddistill.models.decoder import DecoderConfig
from moddistill.models.vlm import ModelConfig

_DENSE = re.compile(r"(.*\blayers\.\d+\.mlp\.)((?:gate|up|down)_proj\.weight)")
_ROUTER = re.compile(r"(.*\blayers\.)(\d+)(\.mlp\.gate\.weight)")


def uniform_config(config: ModelConfig) -> ModelConfig:
    """Returns the architecture with experts in every layer.

    Raises:
      UserError: the model has no experts, or experts of another width than its dense layers.
    """
    decoder, moe = config.decoder, config.decoder.moe
    if moe is None:
        raise UserError(
            "--uniform: expected a sparse model, got a dense one, whose layers are all alike "
            "already; export it without"
        )
    if len(decoder.moe_layers) == decoder.num_layers:
        return config
    if moe.moe_intermediate_size not in (0, decoder.intermediate_size):
        raise invalid(
            "--uniform: moe.moe_intermediate_size",
            moe.moe_intermediate_size,
            f"{decoder.intermediate_size}, the width of the dense layers, which become experts",
        )
    every = dataclasses.replace(moe, placement="every_layer")
    return dataclasses.replace(config, decoder=dataclasses.replace(decoder, moe=every))


def uniform_tensors(mapped: Sequence[MappedTensor], decoder: DecoderConfig) -> list[MappedTensor]:
    """Returns the tensors with each dense layer's repeated for every expert."""
    tensors = []
    for tensor in mapped:
        dense = _DENSE.fullmatch(tensor.name)
        if dense is None:
            tensors.append(tensor)
            continue
        layer, name = dense.groups()
        scale = 1.0
        if name.startswith("down") and not decoder.moe.norm_topk_prob:
            scale = decoder.moe.num_experts / decoder.moe.top_k
        for expert in range(decoder.moe.num_experts):
            expert_name = f"{layer}experts.{expert}.{name}"
            transform = _scaled(tensor.transform, scale)
            tensors.append(dataclasses.replace(tensor, name=expert_name, transform=transform))
    return tensors


def zero_routers(mapped: Sequence[MappedTensor], decoder: DecoderConfig) -> dict[str, str]:
    """Returns the routers that are not stored by name, each with the name of one that is."""
    stored = {int(match[2]): match for x in mapped if (match := _ROUTER.fullmatch(x.name))}
    missing = [layer for layer in decoder.moe_layers if layer not in stored]
    like = stored[min(stored)] if missing else None
    return {f"{like[1]}{layer}{like[3]}": like[0] for layer in missing}


def _scaled(transform: Transform, scale: float) -> Transform:
    if scale == 1:
        return transform

    def to_tensor(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return transform.to_tensor(x, shape) * np.float32(scale)

    return transform._replace(to_tensor=to_tensor)
