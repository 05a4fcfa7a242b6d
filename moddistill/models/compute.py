"""Settings that change a model's speed, memory and rounding, but not its architecture."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Settings of one run of a model; never stored with it.

    Attributes:
      dtype: of activations and matmuls; norms, softmax and routers stay in float32.
      remat: `none`, `matmuls` or `full`, as in `layers.rematerialised`.
      one_segment: each row of a batch is one sample, padded on the right, as without packing;
        attention kernels may then read its length in place of its segments.
      unroll: compile the layers one by one instead of as a loop.
      stacked: equal layers share arrays, with the layers as first axis, as they are stored. Else
        each layer has its own (`layer_plan.separate`), which decoding reads without a copy.
      quantized_layers: the decoder's layers are stored as `models/quantization.py` does.
      expert_transport: collective that moves tokens to their experts, as in `moe/expert_parallel`.
      token_routing: the statistics of routers include the probabilities of every token.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    one_segment: bool = False
    unroll: bool = False
    stacked: bool = True
    quantized_layers: bool = False
    expert_transport: str = "all_gather"
    token_routing: bool = False

    def without_gradients(self) -> "ComputeConfig":
        """The settings by which a model that trains is decoded.

        Layers stay stacked: each of its own would be a copy.
        """
        return ComputeConfig(
            dtype=self.dtype, unroll=self.unroll, expert_transport=self.expert_transport
        )
