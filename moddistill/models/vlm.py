"""The multimodal model: vision encoder, projector, decoder.

    output = model.apply({"params": params}, batch)  # a moddistill.models.batch.Batch

The two sides of a preference pair share images, so there may be fewer rows of images than of
tokens. Image placeholders are already repeated once per patch, so splicing is a gather and a
`where`. The model returns hidden states and the head's matrix, not logits: losses contract them in
chunks.
"""

import dataclasses
import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from moddistill.models.attention_kernels import Structure, causal
from moddistill.models.batch import Batch, image_positions, make_batch
from moddistill.models.compute import ComputeConfig
from moddistill.models.decoder import Context, Decoder, DecoderConfig
from moddistill.models.kv_cache import KVCache
from moddistill.models.moe.router import RouterStats
from moddistill.models.projector import Projector
from moddistill.models.vision import Vision, VisionConfig
from moddistill.params import check_groups, flatten


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture and conversation format; `vision` is None for a language model.

    Attributes:
      context: tokens of the longest text that the language model was made for; 0 if unknown.
    """

    decoder: DecoderConfig
    vision: VisionConfig | None
    projector: str
    template: str
    image_token_id: int
    context: int = 0


@flax.struct.dataclass
class Output:
    """Final hidden states, the head, and the vision encoder's features (None without images)."""

    hidden: Float[Array, "B T D"]
    head: Float[Array, "V D"]
    router: RouterStats | None
    cache: KVCache | None
    features: Float[Array, "U X W"] | None


class Vlm(nn.Module):
    """A causal multimodal language model: its architecture, and how it is computed."""

    config: ModelConfig
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(self, batch: Batch, cache: KVCache | None = None) -> Output:
        """Hidden states [B, T, D] of a batch; with `cache`, its tokens continue those in there."""
        config = self.config
        valid = batch.segments > 0
        is_image = image_positions(batch, config.image_token_id)
        if cache is None:
            structure = causal(batch.segments, self.compute.one_segment)
        else:
            # The slot of the first of these tokens: `length` before it is extended by them.
            offset, cache = cache.length, cache.extend(batch.segments)
            structure = Structure(batch.segments, cache.segments, offset)
        context = Context(batch.positions, structure, valid, is_image)
        features = batch.features
        if config.vision is not None and batch.images is not None:
            features = self._encode_images(batch.images)
        image_hidden = None
        if features is not None:
            width = config.decoder.hidden_size
            projector = Projector(config.projector, width, self.compute.dtype, name="projector")
            patches = projector(features)
            # Row i of the images belongs to rows i, i + U, ... of the tokens.
            patches = jnp.tile(patches, (len(batch.tokens) // len(patches), 1, 1))
            image_hidden = splice(patches, is_image)
        decoder = Decoder(config.decoder, self.compute, name="decoder")
        layers = cache.layers if cache else None
        hidden, head, router, layers = decoder(batch.tokens, image_hidden, context, layers)
        cache = cache.replace(layers=layers) if cache else None
        return Output(hidden, head, router, cache, features)

    def _encode_images(self, images: Array) -> Float[Array, "U X W"]:
        """Vision features of all images of each row, concatenated along patches."""
        # [U, I, h, w, 3] to [U * I, h, w, 3]. Shapes are static, so unused slots are encoded too;
        # no placeholder refers to them.
        flat = images.reshape(-1, *images.shape[2:])
        encoder = Vision(self.config.vision, self.compute, name="vision")
        features = encoder(flat)
        return features.reshape(len(images), -1, features.shape[-1])

    @staticmethod
    def logits(output: Output) -> Float[Array, "B T V"]:
        """All logits in float32, including those of padded vocabulary rows.

        For tests and single positions: this is B * T * V floats.
        """
        return jnp.einsum(
            "BTD,VD->BTV", output.hidden, output.head, preferred_element_type=jnp.float32
        )


def splice(patches: Float[Array, "B X D"], is_image: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
    """The n-th patch at the n-th image position of each row; elsewhere an arbitrary patch."""
    # The n-th image position counts n image positions up to itself.
    index = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)
    return jax.vmap(lambda rows, i: jnp.take(rows, i, axis=0, mode="clip"))(patches, index)


def dummy_batch(config: ModelConfig) -> Batch:
    """The smallest batch that touches every parameter; for shapes and initialisation."""
    images = (1, config.vision.image_size) if config.vision else None
    return make_batch(jnp.ones, rows=1, length=1, images=images)


@functools.cache  # tracing takes a fraction of a second, and this is called many times
def abstract_params(config: ModelConfig) -> Any:
    """Shapes of all parameters, as a nested dict whose leaves carry logical axis names."""
    model = Vlm(config)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), dummy_batch(config)))["params"]
    required = ["kernels", "embeddings", "norms"]
    required += ["experts", "routers"] if config.decoder.moe_layers else []
    required += ["positions", "biases"] if config.vision else []
    check_groups(flatten(shapes), required)
    return shapes
