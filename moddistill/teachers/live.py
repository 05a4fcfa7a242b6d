"""A teacher that runs inside the training step: loading, checks, targets."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moddistill.config import TrainConfig
from moddistill.convert.resolve import ResolvedModel, random_params
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.errors import UserError, at_field
from moddistill.models.batch import Batch
from moddistill.models.logits import LogitInputs, masked_logits
from moddistill.models.quantization import loading_shapes, quantize_all
from moddistill.models.vlm import ModelConfig, Output, Vlm
from moddistill.models.vocabulary import IdRanges
from moddistill.params import Flat, cast_frozen, flatten
from moddistill.storage.model_folder import load_params
from moddistill.teachers.alignment import check_template, shared_ids
from moddistill.teachers.targets import FullLogits, Targets


@dataclasses.dataclass(frozen=True)
class LiveTeacher:
    """A `Teacher` that computes its targets: final hidden states, and its head as what is shared.

    Hidden states are smaller than logits by `hidden_size / vocab_size`, 3,584 / 152,064 for
    Qwen2-7B; logits are computed from them chunk by chunk.
    """

    model: Vlm

    @property
    def real_ids(self) -> IdRanges:
        return self.model.config.decoder.real_ids

    def targets(self, params: Any, batch: Batch, student: Output) -> Targets:
        inputs = teacher_inputs(params, batch, student)
        output = jax.lax.stop_gradient(self.model.apply({"params": params}, inputs))
        return Targets(output.hidden.reshape(-1, output.hidden.shape[-1]), output.head)

    def predictions(self, targets: Targets, real_ids: IdRanges) -> FullLogits:
        return FullLogits(masked_logits(targets.per_position, targets.shared, real_ids))

    def logit_inputs(self, targets: Targets) -> LogitInputs:
        return LogitInputs(targets.per_position, targets.shared)


def teacher_inputs(params: dict[str, Any], batch: Batch, student: Output) -> Batch:
    """Returns the student's batch, with features for images if `params` have no vision tower."""
    if "vision" in params or student.features is None:
        return batch
    # The encoder is frozen and equal in both models, so its features are computed once per step.
    return batch._replace(images=None, features=jax.lax.stop_gradient(student.features))


def teacher_architecture(
    config: TrainConfig, teacher: ResolvedModel, student: ModelConfig, tokenizer: Tokenizer
) -> ModelConfig:
    """The teacher's architecture with the `real_ids` that it shares with the student.

    Raises:
      UserError: if the teacher does not fit the student or the template of the records.
    """
    check_teacher(teacher.config, student, teacher.spec)
    if teacher.folder is None:
        return teacher.config
    check_template(config, teacher.config.template)
    shared = shared_ids(load_tokenizer(str(teacher.folder)), tokenizer, teacher.spec)
    decoder = dataclasses.replace(teacher.config.decoder, real_ids=shared)
    return dataclasses.replace(teacher.config, decoder=decoder)


def check_teacher(teacher: ModelConfig, student: ModelConfig, origin: str) -> None:
    """Raises UserError unless both models read the same tokens and images of the same size.

    Args:
      origin: name of the teacher, for the message.
    """
    pairs = {"image token": (teacher.image_token_id, student.image_token_id)}
    if student.vision is not None:
        if teacher.vision is None:
            raise UserError(
                f"expected a teacher with a vision tower, as the student has, got {origin!r} "
                "without one"
            )
        pairs["positions per image"] = (teacher.vision.patches, student.vision.patches)
        pairs["image size"] = (teacher.vision.image_size, student.vision.image_size)
    for name, (of_teacher, of_student) in pairs.items():
        if of_teacher != of_student:
            raise UserError(
                f"{name} of {origin!r}: expected {of_student} as in the student, got {of_teacher}"
            )


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
