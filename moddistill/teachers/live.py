"""The teacher as a model that runs in the step."""

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
from moddistill.models.quantization import pack_all, unpacked_shapes
from moddistill.models.vlm import ModelConfig, Output
from moddistill.params import Flat, cast_frozen, flatten
from moddistill.storage.model_folder import load_params
from moddistill.teachers.alignment import shared_ids


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


def check_template(config: TrainConfig, trained_with: str) -> None:
    """Raises UserError unless records are rendered in the template that the teacher knows.

    In another one its distributions are those of text that it was never trained on.
    """
    if config.data.template != trained_with:
        raise UserError(
            f"config.data.template is {config.data.template!r}, but the template of the teacher "
            f"{config.teacher!r} is {trained_with!r}; accepted: {trained_with!r}, or the teacher "
            f"imported with --template {config.data.template}"
        )


def load_teacher(
    config: TrainConfig, folder: Path | None, teacher: ModelConfig, shapes: Any, mesh: Mesh
) -> dict[str, Any]:
    """The teacher's parameters in `shapes`, read straight into their shards and dtypes."""
    dtype = jnp.dtype(config.dtype)
    if folder is None:
        params = random_params(teacher, mesh, jax.random.key(config.seed + 1))
        return pack_all(cast_frozen(params, dtype), shapes)
    read = unpacked_shapes(shapes, dtype)
    with at_field("config.teacher"):
        params = load_params(
            folder,
            teacher,
            dtype=jax.tree.map(lambda x: x.dtype, read),
            shardings=jax.tree.map(lambda x: x.sharding, read),
        )
    return pack_all(params, shapes)


def same_tower(student: Flat, teacher: dict[str, Any]) -> bool:
    """Whether all weights of two towers are equal, a frozen student's and its teacher's."""
    theirs = {path: x for path, x in flatten(teacher).items() if path.startswith("vision/")}
    if not all(path in student for path in theirs):
        return False
    pairs = [(x, student[path]) for path, x in theirs.items()]
    equal = jax.jit(lambda pairs: jnp.stack([jnp.all(a == b) for a, b in pairs]))
    return bool(jnp.all(equal(pairs)))


def check_teacher(teacher: ModelConfig, student: ModelConfig, origin: str) -> None:
    """Raises UserError unless both models read the same tokens and images of the same size."""
    pairs = {
        "image token": (teacher.image_token, student.image_token),
    }
    if student.vision is not None and teacher.vision is None:
        raise UserError(f"teacher {origin!r} has no vision tower, the student has one")
    if student.vision is not None:
        pairs["positions an image"] = (teacher.vision.patches, student.vision.patches)
        pairs["image size"] = (teacher.vision.image_size, student.vision.image_size)
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UserError(
                f"teacher {origin!r} does not fit: {name} {theirs}, the student's {ours}; "
                "accepted: a teacher with the student's tokenizer and image positions"
            )


def shares_tower(
    student: ModelConfig, teacher: ModelConfig | None, trained: Collection[str]
) -> bool:
    """Whether one pass of one tower can serve both models, if their weights are the same."""
    if teacher is None or student.vision is None or student.vision != teacher.vision:
        return False
    return not any(path.startswith("vision/") for path in trained)


def without_tower(teacher: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a teacher that takes the student's features."""
    return {name: part for name, part in teacher.items() if name != "vision"}


def batch_for_teacher(batch: Batch, seen: Output, teacher_params: dict[str, Any]) -> Batch:
    """The student's batch for its teacher, which without a tower of its own takes the features."""
    if "vision" in teacher_params or seen.features is None:
        return batch
    return batch._replace(images=None, features=jax.lax.stop_gradient(seen.features))
