"""Floating-point operations that a step needs, counted from the architecture.

Those of matrix products alone, a multiplication and an addition each; recomputation and padding do
not count. Compilers count a loop's body once, so their figure is no use.
"""

from typing import NamedTuple

from moddistill.distributed.sharding import unbox
from moddistill.models.decoder import DecoderConfig
from moddistill.models.vision import VisionConfig
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.params import flatten, in_group, is_computed


class StepFlops(NamedTuple):
    """Operations of one step whose rows are all full.

    Attributes:
      student: forward and backward.
      teacher: forward; 0 without one.
      positions: that these operations serve.
    """

    student: float
    teacher: float
    positions: int


class StepSize(NamedTuple):
    """What one step reads: rows, their length, pictures, and positions that meet the vocabulary."""

    rows: int
    length: int
    images: int
    supervised: int


def step_flops(
    student: ModelConfig,
    teacher: ModelConfig | None,
    size: StepSize,
    trained: set[str],
    shared_tower: bool,
) -> StepFlops:
    """FLOPs of one training step.

    Args:
      trained: paths of the parameters that train.
      shared_tower: whether the teacher reuses the features of the student's vision encoder.
    """
    teacher_flops = 0.0
    if teacher is not None:
        teacher_flops = forward_flops(teacher, size)
        teacher_flops -= size.images * tower_flops(teacher.vision) if shared_tower else 0.0
    return StepFlops(training_flops(student, size, trained), teacher_flops, size.rows * size.length)


def forward_flops(config: ModelConfig, size: StepSize) -> float:
    """Of one pass through tower, projector, decoder and, at supervised positions, the head."""
    seen = size.rows * size.length
    total = seen * decoder_flops(config.decoder, size.length)
    total += size.supervised * 2.0 * config.decoder.width * config.decoder.vocab_size
    if config.vision is not None:
        patches = config.vision.patches
        total += size.images * (tower_flops(config.vision) + patches * _projector_flops(config))
    return total


def training_flops(config: ModelConfig, size: StepSize, trained: set[str]) -> float:
    """Of a student's forward and backward pass, in which only `trained` paths get a gradient.

    The gradient of activations costs as much as the forward pass wherever something below trains,
    that of weights as much again where they train. Attention multiplies activations with each
    other, whose gradients are two. A frozen tower is below everything.
    """
    share = _trained_share(config, trained)
    tower_trains = any(path.startswith("vision/") for path in trained)
    tower = size.images * tower_flops(config.vision) if config.vision else 0.0
    decoder = config.decoder
    scores = size.rows * size.length * decoder.layers * _score_flops(decoder, size.length)
    rest = forward_flops(config, size) - tower - scores
    return tower * (3.0 if tower_trains else 1.0) + rest * (2.0 + share) + scores * 3.0


def decoder_flops(decoder: DecoderConfig, length: int) -> float:
    """Of all layers, for one token of a sequence of that length."""
    heads = decoder.heads * decoder.head_dim
    projections = decoder.width * (2 * heads + 2 * decoder.kv_heads * decoder.head_dim)
    attention = 2.0 * projections + _score_flops(decoder, length)
    dense = 6.0 * decoder.width * decoder.mlp
    sparse = dense
    if decoder.moe is not None:
        width = decoder.moe.moe_intermediate_size or decoder.mlp
        sparse = 6.0 * decoder.width * width * decoder.moe.top_k
        sparse += 2.0 * decoder.width * decoder.moe.num_experts
        sparse += dense if decoder.moe.residual else 0.0
    experts = len(decoder.moe_layers)
    return decoder.layers * attention + experts * sparse + (decoder.layers - experts) * dense


def _score_flops(decoder: DecoderConfig, length: int) -> float:
    """Of one layer's queries with keys and weights with values, for one token."""
    return 4.0 * length * decoder.heads * decoder.head_dim


def tower_flops(vision: VisionConfig) -> float:
    """Of the layers up to the selected one, for one picture."""
    length = vision.patches + vision.class_token
    layer = 8.0 * vision.width**2 + 4.0 * vision.width * vision.mlp + 4.0 * length * vision.width
    patch = 2.0 * 3 * vision.patch_size**2 * vision.width
    return length * vision.used_layers * layer + vision.patches * patch


def _projector_flops(config: ModelConfig) -> float:
    """For one patch."""
    kernels = [
        leaf.size
        for path, leaf in flatten(unbox(abstract_params(config))).items()
        if path.startswith("projector/") and in_group(path, "kernels")
    ]
    return 2.0 * sum(kernels)


def _trained_share(config: ModelConfig, trained: set[str]) -> float:
    """Of the weights that a token meets outside the tower, those that train."""
    moe = config.decoder.moe
    active = {}
    for path, leaf in flatten(unbox(abstract_params(config))).items():
        if not path.startswith("vision/") and path != "decoder/embedding":
            idle = in_group(path, "experts") and moe is not None
            active[path] = leaf.size * (moe.top_k / moe.num_experts if idle else 1.0)
    return sum(size for path, size in active.items() if path in trained) / sum(active.values())


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Parameters stored, and those that one token uses.

    Of the experts these are the `top_k` chosen ones, of the tower those up to the selected layer.
    """
    flat = flatten(unbox(abstract_params(config)))
    total = sum(leaf.size for leaf in flat.values())
    experts = sum(leaf.size for path, leaf in flat.items() if in_group(path, "experts"))
    moe = config.decoder.moe
    idle = experts * (moe.num_experts - moe.top_k) // moe.num_experts if moe else 0
    idle += sum(leaf.size for path, leaf in flat.items() if not is_computed(path))
    return total, total - idle
