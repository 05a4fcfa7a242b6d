"""A teacher that runs inside the training step: loading, checks, targets."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moddistill.config import TrainConfig
from moddistill.convert.resolve import ResolvedModel, random_params
from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError, at_field, invalid
from moddistill.models.batch import Batch, TeacherRows
from moddistill.models.chunks import map_chunks
from moddistill.models.logits import LogitInputs, masked_logits
from moddistill.models.quantization import loading_shapes, quantize_all
from moddistill.models.vlm import ModelConfig, Output, Vlm
from moddistill.models.vocabulary import IdRanges
from moddistill.params import Flat, cast_frozen, flatten
from moddistill.storage.model_folder import load_params
from moddistill.teachers.alignment import check_answer_positions, shared_ids
from moddistill.teachers.targets import FullLogits, LabelLogprobs, Targets


class OwnLayout(NamedTuple):
    """How a teacher reads rows, if not in the tokens of the student.

    Attributes:
      real_ids: ids of all of its tokens, of which the student may lack some.
      ends: the tokens that end an answer of the teacher and of the student, if they are different.
    """

    real_ids: IdRanges
    ends: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class LiveTeacher:
    """A `Teacher` that computes its targets: final hidden states, and its head as what is shared.

    Hidden states are smaller than logits by `hidden_size / vocab_size`, 3,584 / 152,064 for
    Qwen2-7B; logits are computed from them chunk by chunk.

    Attributes:
      chunk_size: positions whose logits are in memory at one time.
      layout: in which it reads the rows, if that is not the student's.
    """

    model: Vlm
    chunk_size: int = 256
    layout: OwnLayout | None = None

    @property
    def real_ids(self) -> IdRanges:
        return self.model.config.decoder.real_ids

    def targets(self, params: Any, batch: Batch, student: Output) -> Targets:
        rows = batch.teacher
        inputs = teacher_inputs(params, batch, student)
        output = jax.lax.stop_gradient(self.model.apply({"params": params}, inputs))
        if rows is None:
            return Targets(output.hidden.reshape(-1, output.hidden.shape[-1]), output.head)
        logprobs = chunk_logprobs(rows, output, self.layout.real_ids, self.chunk_size)
        if rows.known is None:
            return Targets(LabelLogprobs(logprobs.reshape(-1)))
        # Positions without a token of the teacher have a shift of 0, and no loss.
        at = jnp.arange(rows.shift.shape[1])[None] + rows.shift
        hidden = jnp.take_along_axis(output.hidden, at[..., None], axis=1)
        return Targets(hidden.reshape(-1, hidden.shape[-1]), output.head, logprobs)

    def predictions(self, targets: Targets, real_ids: IdRanges) -> FullLogits | LabelLogprobs:
        if isinstance(targets.per_position, LabelLogprobs):
            return targets.per_position
        logits = masked_logits(targets.per_position, targets.shared, real_ids)
        if self.layout is not None and self.layout.ends is not None:
            ends = jnp.array(self.layout.ends)
            logits = logits.at[:, ends].set(logits[:, ends[::-1]])
        return FullLogits(logits)

    def logit_inputs(self, targets: Targets) -> LogitInputs:
        return LogitInputs(targets.per_position, targets.shared)


def teacher_inputs(params: dict[str, Any], batch: Batch, student: Output) -> Batch:
    """Returns the teacher's batch, with features for images if `params` have no vision tower."""
    if batch.teacher is not None:
        rows, images = batch.teacher, batch.teacher_images
        batch = Batch(
            rows.tokens,
            rows.positions,
            rows.segments,
            images=batch.images if images is None else images,
        )
    if "vision" in params or student.features is None:
        return batch
    # The encoder is frozen and equal in both models, so its features are computed once per step.
    return batch._replace(images=None, features=jax.lax.stop_gradient(student.features))


def chunk_logprobs(
    rows: TeacherRows, output: Output, real_ids: IdRanges, chunk_size: int
) -> Float[Array, "B T"]:
    """Returns the log-likelihoods of chunks, or of answers, at the student's positions of these."""
    labels = jnp.roll(rows.tokens, -1, axis=1)

    def logprobs_of(positions: tuple[Array, Array], head: Array) -> Array:
        hidden, labels = positions
        log_p = jax.nn.log_softmax(masked_logits(hidden, head, real_ids))
        return jnp.take_along_axis(log_p, labels[:, None], axis=1, mode="clip")[:, 0]

    hidden = output.hidden.reshape(-1, output.hidden.shape[-1])
    found = map_chunks(
        logprobs_of,
        rows.in_chunk.reshape(-1),
        (hidden, labels.reshape(-1)),
        output.head,
        chunk_size=chunk_size,
    ).reshape(labels.shape)
    at = jnp.arange(labels.shape[1])[None] + rows.chunk_shift
    # Positions outside of chunks are 0 and add nothing.
    return jax.vmap(lambda at, x: jnp.zeros_like(x).at[at].add(x))(at, found)


def teacher_architecture(
    config: TrainConfig,
    teacher: ResolvedModel,
    student: ModelConfig,
    tokenizer: Tokenizer,
    student_tokenizer: Tokenizer,
) -> ModelConfig:
    """The teacher's architecture with the `real_ids` that it shares with the student.

    Raises:
      UserError: if the teacher does not fit the student or the stage.
    """
    check_teacher(teacher.config, student, teacher.spec)
    architecture = teacher.config
    if teacher.folder is None:  # new weights have no template of their own
        architecture = dataclasses.replace(architecture, template=config.data.template)
    check_layout(config, architecture, student, teacher.spec)
    if teacher.folder is None:
        return architecture
    own_tokens = has_own_layout(architecture, student)
    shared = shared_ids(tokenizer, student_tokenizer, teacher.spec, own_tokens)
    decoder = dataclasses.replace(architecture.decoder, real_ids=shared)
    return dataclasses.replace(architecture, decoder=decoder)


def check_teacher(teacher: ModelConfig, student: ModelConfig, origin: str) -> None:
    """Raises UserError for a teacher without a vision encoder of a student with one.

    Args:
      origin: name of the teacher, for the message.
    """
    if student.vision is not None and teacher.vision is None:
        raise UserError(
            f"expected a teacher with a vision tower, as the student has, got {origin!r} "
            "without one"
        )


def has_own_layout(teacher: ModelConfig, student: ModelConfig) -> bool:
    """Returns whether a teacher reads records in other tokens or images than the student does."""
    if (teacher.template, teacher.image_token_id) != (student.template, student.image_token_id):
        return True
    if student.vision is None:
        return False
    same_patches = teacher.vision.patches == student.vision.patches
    return not (same_patches and has_same_images(teacher, student))


def has_same_images(teacher: ModelConfig, student: ModelConfig) -> bool:
    """Returns whether both models read the same pixels of an image."""
    if student.vision is None:
        return True
    # Images are padded with the colour of the mean.
    found = [(each.vision.image_size, each.vision.mean) for each in (teacher, student)]
    return found[0] == found[1]


def check_layout(
    config: TrainConfig, teacher: ModelConfig, student: ModelConfig, origin: str
) -> None:
    """Raises UserError for losses at all positions, if the layouts of the models differ.

    Args:
      origin: name of the teacher, for the message.
    """
    if not has_own_layout(teacher, student):
        return
    reason = (
        f"since the teacher {origin!r} has another template, image token or image size than the "
        "student"
    )
    check_answer_positions(config, reason)
    if config.on_policy.share:
        raise invalid("config.on_policy.share", config.on_policy.share, f"0, {reason}")


def load_teacher(
    config: TrainConfig, folder: Path | None, teacher: ModelConfig, shapes: Any, mesh: Mesh
) -> dict[str, Any]:
    """Reads the teacher's parameters into the dtypes and shardings of `shapes`."""
    dtype = jnp.dtype(config.dtype)
    if folder is None:
        params = random_params(teacher, mesh, jax.random.key(config.seed + 1))
        return quantize_all(cast_frozen(params, dtype), shapes)
    read = loading_shapes(shapes, dtype)
    with at_field("config.teacher"):
        params = load_params(
            folder,
            teacher,
            dtype=jax.tree.map(lambda x: x.dtype, read),
            shardings=jax.tree.map(lambda x: x.sharding, read),
        )
    return quantize_all(params, shapes)


def shares_tower(
    student: ModelConfig, teacher: ModelConfig | None, trained: Collection[str]
) -> bool:
    """Returns whether the architectures allow both models to use one tower's features.

    They do if the towers are equal and the student's is frozen; `same_tower` compares weights.

    Args:
      trained: paths of the student's trainable parameters.
    """
    if teacher is None or student.vision is None or student.vision != teacher.vision:
        return False
    return not any(path.startswith("vision/") for path in trained)


def same_tower(student: Flat, teacher: dict[str, Any]) -> bool:
    """Returns whether the teacher's tower has the weights of a student's frozen one."""
    tower = {path: x for path, x in flatten(teacher).items() if path.startswith("vision/")}
    if not all(path in student for path in tower):
        return False
    pairs = [(x, student[path]) for path, x in tower.items()]
    equal = jax.jit(lambda pairs: jnp.stack([jnp.all(a == b) for a, b in pairs]))
    return bool(jnp.all(equal(pairs)))


def without_tower(teacher: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a teacher that reuses the student's image features."""
    return {name: part for name, part in teacher.items() if name != "vision"}
