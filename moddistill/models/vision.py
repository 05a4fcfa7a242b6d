"""The CLIP vision tower: patches in, features of an inner layer out."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from moddistill.models.attention import Attention
from moddistill.models.layers import (
    DType,
    LayerNorm,
    Linear,
    exact_gelu,
    init_normal,
    quick_gelu,
)

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": exact_gelu}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower; `select_layer` counts hidden states from the end, as LLaVA does."""

    image_size: int
    patch_size: int
    width: int
    mlp: int
    layers: int
    heads: int
    select_layer: int = -2
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def patches(self) -> int:
        """Feature vectors, and so decoder positions, of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def used_layers(self) -> int:
        """Layers below the selected hidden state; those above are never computed."""
        return self.layers + 1 + self.select_layer


class VisionBlock(nn.Module):
    config: VisionConfig
    dtype: DType

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B T D"], _: None
    ) -> tuple[Float[Array, "B T D"], None]:
        config = self.config
        head_dim = config.width // config.heads
        attention = Attention(
            config.heads, config.heads, head_dim, None, True, self.dtype, name="attention"
        )
        mixed, _ = attention(LayerNorm(config.norm_eps, name="attention_norm")(hidden))
        hidden = hidden + mixed
        x = LayerNorm(config.norm_eps, name="mlp_norm")(hidden)
        x = Linear((config.mlp,), ("embed",), ("mlp",), True, self.dtype, name="up")(x)
        x = ACTIVATIONS[config.activation](x)
        x = Linear((config.width,), ("mlp",), ("embed",), True, self.dtype, name="down")(x)
        return hidden + x, None


class Vision(nn.Module):
    """CLIP ViT up to the selected layer, class token dropped (LLaVA's `patch` feature)."""

    config: VisionConfig
    dtype: DType
    remat: bool

    @nn.compact
    def __call__(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        config = self.config
        x = patchify(normalise(images, config), config.patch_size)
        x = Linear((config.width,), ("patch",), ("embed",), False, self.dtype, name="patch")(x)
        std = config.width**-0.5
        class_token = self.param(
            "class_token", init_normal("embed", std=std), (config.width,), jnp.float32
        )
        shape = (config.patches + 1, config.width)
        table = self.param(
            "positions", init_normal("patches", "embed", std=std), shape, jnp.float32
        )
        first = jnp.broadcast_to(class_token, (len(x), 1, config.width)).astype(x.dtype)
        x = jnp.concatenate([first, x], axis=1) + table[None].astype(x.dtype)
        x = LayerNorm(config.norm_eps, name="pre_norm")(x)
        block = nn.remat(VisionBlock, prevent_cse=False) if self.remat else VisionBlock
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.used_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(config, self.dtype, name="layers")(x, None)
        return x[:, 1:]


def normalise(images: UInt8[Array, "B H W 3"], config: VisionConfig) -> Float[Array, "B H W 3"]:
    """Pixels scaled to [0, 1], then by the tower's mean and deviation, float32."""
    mean = jnp.asarray(config.mean, jnp.float32)[None, None, None]
    std = jnp.asarray(config.std, jnp.float32)[None, None, None]
    return (images.astype(jnp.float32) / 255 - mean) / std


def patchify(images: Float[Array, "B H W 3"], size: int) -> Float[Array, "B P X"]:
    """Square patches in reading order, each flattened as (row, column, channel)."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
