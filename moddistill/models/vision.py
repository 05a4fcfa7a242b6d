"""The vision encoder of CLIP or SigLIP, up to the layer whose features a model uses."""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from moddistill.distributed.sharding import constrain_to_batch_sharding
from moddistill.errors import invalid, not_one_of
from moddistill.models.attention import Attention
from moddistill.models.compute import ComputeConfig
from moddistill.models.layers import (
    DType,
    LayerNorm,
    Linear,
    exact_gelu,
    init_normal,
    quick_gelu,
    rematerialised,
    tanh_gelu,
)

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": exact_gelu, "gelu_tanh": tanh_gelu}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Architecture of the encoder; `select_layer` counts hidden states from the end, as LLaVA does.

    The defaults are CLIP's. SigLIP has no class token and no norm before the layers, biased
    patches, `gelu_tanh`, `norm_eps` 1e-6, and 0.5 for every mean and standard deviation.

    Raises:
      UserError: for an unknown activation, or a `select_layer` outside the encoder.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    select_layer: int = -2
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    class_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise not_one_of("vision.activation", self.activation, ACTIVATIONS)
        if not -self.num_layers <= self.select_layer <= -1:
            expected = (
                f"{-self.num_layers} to -1, a hidden state after one of {self.num_layers} layers"
            )
            raise invalid("vision.select_layer", self.select_layer, expected)

    @property
    def patches(self) -> int:
        """Feature vectors, and decoder positions, of one image; partial patches have none."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def used_layers(self) -> int:
        """Number of layers up to the selected hidden state; later ones are never computed."""
        # Hidden states are numbered from 0 (embeddings) to num_layers, so -1 is num_layers. State n
        # is the output of n layers.
        return self.num_layers + 1 + self.select_layer


class VisionLayer(nn.Module):
    """A pre-norm layer of full attention and an MLP, with biases everywhere."""

    config: VisionConfig
    dtype: DType

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "B T D"], _: None
    ) -> tuple[Float[Array, "B T D"], None]:
        config = self.config
        hidden = constrain_to_batch_sharding(hidden)
        head_dim = config.hidden_size // config.num_heads
        attention = Attention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=head_dim,
            out_bias=True,
            dtype=self.dtype,
            name="attention",
        )
        mixed, _ = attention(LayerNorm(config.norm_eps, name="attention_norm")(hidden))
        hidden = hidden + mixed
        x = LayerNorm(config.norm_eps, name="mlp_norm")(hidden)
        x = self._linear("up", config.intermediate_size, "embed", "mlp")(x)
        x = ACTIVATIONS[config.activation](x)
        return hidden + self._linear("down", config.hidden_size, "mlp", "embed")(x), None

    def _linear(self, name: str, features: int, inputs: str, outputs: str) -> Linear:
        return Linear(
            features=(features,),
            inputs=(inputs,),
            outputs=(outputs,),
            use_bias=True,
            dtype=self.dtype,
            name=name,
        )


class Vision(nn.Module):
    """A ViT up to the selected layer; a class token is dropped (LLaVA's `patch` feature)."""

    config: VisionConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(self, images: UInt8[Array, "B h w 3"]) -> Float[Array, "B P D"]:
        config = self.config
        x = self._embed(images)
        if config.pre_norm:
            x = LayerNorm(config.norm_eps, name="pre_norm")(x)
        x, _ = self._layers(config.used_layers, "layers")(x, None)
        self._init_never_computed(x)
        # LLaVA's `patch` feature: patches attend to the class token, which is then dropped.
        return x[:, 1:] if config.class_token else x

    def _embed(self, images: UInt8[Array, "B h w 3"]) -> Float[Array, "B T D"]:
        """Embedded patches with positions, after the class token if there is one."""
        config = self.config
        # The stride of the patch convolution is its size, so it is one matmul of flattened patches.
        x = patchify(normalise(images, config), config.patch_size)
        patch = Linear(
            features=(config.hidden_size,),
            inputs=("patch",),
            outputs=("embed",),
            use_bias=config.patch_bias,
            dtype=self.compute.dtype,
            name="patch",
        )
        x = patch(x)
        std = config.hidden_size**-0.5
        if config.class_token:
            class_token = self.param(
                "class_token", init_normal("embed", std=std), (config.hidden_size,), jnp.float32
            )
            first = jnp.broadcast_to(class_token, (len(x), 1, config.hidden_size)).astype(x.dtype)
            x = jnp.concatenate([first, x], axis=1)
        shape = (config.patches + config.class_token, config.hidden_size)
        table = self.param(
            "positions", init_normal("patches", "embed", std=std), shape, jnp.float32
        )
        return x + table[None].astype(x.dtype)

    def _layers(self, length: int, name: str) -> nn.Module:
        layers = nn.scan(
            rematerialised(VisionLayer, self.compute.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=length,
            unroll=length if self.compute.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(self.config, self.compute.dtype, name=name)

    def _init_never_computed(self, x: Float[Array, "B T D"]) -> None:
        """Initialises the layers after the selected one and the final norm, `NEVER_COMPUTED`.

        An encoder is stored with all its parameters, so that it can be exported as published. Only
        `init` uses these; `apply` accepts them and does not compute them.
        """
        if not self.is_initializing():
            return
        config = self.config
        unused = config.num_layers - config.used_layers
        if unused:
            self._layers(unused, "unused")(x, None)
        LayerNorm(config.norm_eps, name="post_norm")(x)


def normalise(images: UInt8[Array, "B h w 3"], config: VisionConfig) -> Float[Array, "B h w 3"]:
    """Pixels scaled to [0, 1], then standardised by the encoder's mean and standard deviation."""
    mean = jnp.asarray(config.mean, jnp.float32)[None, None, None]
    std = jnp.asarray(config.std, jnp.float32)[None, None, None]
    return (images.astype(jnp.float32) / 255 - mean) / std


def patchify(images: Float[Array, "B h w 3"], size: int) -> Float[Array, "B P Z"]:
    """Square patches in reading order, each flattened as (row, column, channel).

    Pixels at the right and bottom edge that fill no patch are dropped.
    """
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images[:, : rows * size, : columns * size]
    # [B, rows, size, columns, size, 3] to [B, rows, columns, size, size, 3].
    x = x.reshape(batch, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
