"""FLOPs of a step, counted from the architecture.

Only matmuls count, with two FLOPs per multiply-add; recomputation and padding do not count. XLA's
cost analysis counts the body of a loop once, so it cannot be used for scanned layers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from moddistill.distributed.sharding import unbox
from moddistill.models.batch import AnyBatch, image_positions, num_tokens, sides_of
from moddistill.models.decoder import DecoderConfig
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import flatten, in_group, is_computed


class StepFlops(NamedTuple):
    """FLOPs of one step.

    Attributes:
      student: forward and backward, and its own answers.
      teacher: forward; 0 without one.
    """

    student: float
    teacher: float


class StepSize(NamedTuple):
    """Content of a step without its padding. FLOPs are a linear function of it.

    Attributes:
      tokens: of all samples, those of images included.
      squared_lengths: the sum over samples of `length ** 2`, the scores of an attention head.
      images: of all samples; a preference pair shares them.
      supervised: tokens with a loss, where logits exist.
    """

    tokens: float | Float[Array, ""]
    squared_lengths: float | Float[Array, ""]
    images: float | Float[Array, ""]
    supervised: float | Float[Array, ""]


def size_of_batch(batch: AnyBatch, config: ModelConfig) -> StepSize:
    """Returns the content of a batch with loss masks, as arrays.

    Args:
      config: of the student, whose placeholders are counted.
    """
    squares = supervised = images = jnp.zeros((), jnp.float32)
    for side in sides_of(batch):
        # Over a sample, 1 + 3 + 5 + ... is length ** 2. In float32, since int32 could overflow.
        squares += jnp.sum(jnp.where(side.segments > 0, 2.0 * side.positions + 1.0, 0.0))
        supervised += jnp.sum(side.loss_mask, dtype=jnp.float32)
    if config.vision is not None:
        placeholders = image_positions(sides_of(batch)[0], config.image_token_id)
        images = jnp.sum(placeholders) / config.vision.patches
    return StepSize(num_tokens(batch), squares, images, supervised)


def step_flops(
    student: ModelConfig,
    teacher: ModelConfig | None,
    size: StepSize,
    trained: set[str],
    shared_tower: bool,
    image_logits: bool = False,
    sides: int = 1,
    answered: float = 0.0,
) -> StepFlops:
    """FLOPs of one training step.

    Without the matrices of a relation loss: with 8 rows of 2,048 tokens they are 2 % of the rest.

    Args:
      trained: paths of the parameters that train.
      shared_tower: whether the teacher reuses the features of the student's vision encoder.
      image_logits: whether a loss computes the head at image positions too.
      sides: of a record, which share its images: two of a pair.
      answered: share of the rows that the student answers itself before the step.
    """
    if image_logits:
        size = size._replace(supervised=size.supervised + size.images * student.vision.patches)
    teacher_flops = 0.0
    if teacher is not None:
        teacher_flops = forward_flops(teacher, _as_read_by(teacher, student, size, sides))
        teacher_flops -= size.images * vision_flops(teacher.vision) if shared_tower else 0.0
    # Prompts are read, and tokens of answers made, one after the other: each position once more.
    answers = answered * forward_flops(student, size)
    return StepFlops(training_flops(student, size, trained) + answers, teacher_flops)


def _as_read_by(teacher: ModelConfig, student: ModelConfig, size: StepSize, sides: int) -> StepSize:
    """The content with the teacher's patches of images, but the text of the student's template.

    Scores of further patches with text do not count, a few in a thousand of all FLOPs.
    """
    if student.vision is None:
        return size
    its, ours = teacher.vision.patches, student.vision.patches
    return size._replace(
        tokens=size.tokens + sides * size.images * (its - ours),
        squared_lengths=size.squared_lengths + sides * size.images * (its**2 - ours**2),
    )


def forward_flops(config: ModelConfig, size: StepSize) -> float:
    """FLOPs of one forward pass; the head is counted at supervised positions only."""
    total = size.tokens * decoder_flops(config.decoder)
    total += size.squared_lengths * _score_flops(config.decoder)
    total += size.supervised * 2.0 * config.decoder.hidden_size * config.decoder.vocab_size
    if config.vision is not None:
        patches = config.vision.patches
        total += size.images * (vision_flops(config.vision) + patches * _projector_flops(config))
    return total


def training_flops(config: ModelConfig, size: StepSize, trained: set[str]) -> float:
    """FLOPs of a student's forward and backward pass with gradients of the `trained` paths.

    Forward F; gradients of activations F, wherever an earlier layer trains; gradients of weights F
    for weights that train. Both operands of attention's matmuls are activations, so their backward
    pass takes 2 F. The vision encoder comes first: if it is frozen, it has no backward pass.
    """
    share = _trained_share(config, trained)
    vision_trains = any(path.startswith("vision/") for path in trained)
    vision = size.images * vision_flops(config.vision) if config.vision else 0.0
    scores = size.squared_lengths * _score_flops(config.decoder)
    rest = forward_flops(config, size) - vision - scores
    # rest: F forward, F for activations, share * F for weights. scores: F forward, 2 F backward.
    return vision * (3.0 if vision_trains else 1.0) + rest * (2.0 + share) + scores * 3.0


def decoder_flops(decoder: DecoderConfig) -> float:
    """FLOPs of all layers for one token, without those of attention scores."""
    heads = decoder.num_heads * decoder.head_dim
    # Query and output have all heads, key and value only `num_kv_heads`.
    projections = decoder.hidden_size * (2 * heads + 2 * decoder.num_kv_heads * decoder.head_dim)
    attention = 2.0 * projections
    # `gate`, `up` and `down`: 3 matmuls of 2 D F each.
    dense = 6.0 * decoder.hidden_size * decoder.intermediate_size
    sparse = dense
    if decoder.moe is not None:
        width = decoder.moe.moe_intermediate_size or decoder.intermediate_size
        sparse = 6.0 * decoder.hidden_size * width * decoder.moe.top_k
        # The router, one matmul [D, E].
        sparse += 2.0 * decoder.hidden_size * decoder.moe.num_experts
        sparse += dense if decoder.moe.residual else 0.0
    experts = len(decoder.moe_layers)
    return (
        decoder.num_layers * attention + experts * sparse + (decoder.num_layers - experts) * dense
    )


def _score_flops(decoder: DecoderConfig) -> float:
    """FLOPs of all layers' scores and weighted values, for one query and one key."""
    # Q K^T and its product with V, 2 H each for every head. The causal mask is not deducted, as in
    # PaLM's MFU (Chowdhery et al. 2022).
    return 4.0 * decoder.num_layers * decoder.num_heads * decoder.head_dim


def vision_flops(vision: VisionConfig) -> float:
    """FLOPs of the vision encoder up to the selected layer, for one image."""
    length = vision.patches + vision.class_token
    # Four projections (8 D^2), two matmuls of the MLP (4 D F), scores and weighted values (4 T D).
    layer = (
        8.0 * vision.hidden_size**2
        + 4.0 * vision.hidden_size * vision.intermediate_size
        + 4.0 * length * vision.hidden_size
    )
    patch = 2.0 * 3 * vision.patch_size**2 * vision.hidden_size
    return length * vision.used_layers * layer + vision.patches * patch


def _projector_flops(config: ModelConfig) -> float:
    """FLOPs of one patch."""
    kernels = [
        leaf.size
        for path, leaf in flatten(unbox(abstract_params(config))).items()
        if path.startswith("projector/") and in_group(path, "kernels")
    ]
    return 2.0 * sum(kernels)


def _trained_share(config: ModelConfig, trained: set[str]) -> float:
    """Share of trained weights among those a token uses outside the vision encoder."""
    moe = config.decoder.moe
    active = {}
    for path, leaf in flatten(unbox(abstract_params(config))).items():
        # The embedding is a lookup. As a tied head it counts with the share of all others.
        if not path.startswith("vision/") and path != "decoder/embedding":
            # A token uses top_k of num_experts experts.
            idle = in_group(path, "experts") and moe is not None
            active[path] = leaf.size * (moe.top_k / moe.num_experts if idle else 1.0)
    return sum(size for path, size in active.items() if path in trained) / sum(active.values())


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Numbers of parameters stored and used by one token.

    Used are `top_k` experts of each layer, and the vision encoder up to the selected layer.
    """
    flat = flatten(unbox(abstract_params(config)))
    total = sum(leaf.size for leaf in flat.values())
    experts = sum(leaf.size for path, leaf in flat.items() if in_group(path, "experts"))
    moe = config.decoder.moe
    idle = experts * (moe.num_experts - moe.top_k) // moe.num_experts if moe else 0
    idle += sum(leaf.size for path, leaf in flat.items() if not is_computed(path))
    return total, total - idle
