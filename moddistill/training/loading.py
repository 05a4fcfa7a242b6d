"""The models a stage begins with: architectures first, then parameters into their shards."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moddistill.config import TrainConfig
from moddistill.data.tokenizer import CONTROLS, Tokenizer, load_tokenizer
from moddistill.distributed.sharding import param_shardings, unbox
from moddistill.errors import at_field
from moddistill.models.presets import preset, with_vocabulary
from moddistill.models.quantization import pack_all, unpacked_shapes
from moddistill.models.upcycle import upcycle, upcycle_config
from moddistill.models.vlm import ModelConfig, Vlm, dummy_batch
from moddistill.models.vocabulary import IdRanges, id_ranges
from moddistill.params import Flat, flatten
from moddistill.storage.model_folder import (
    abstract_params,
    as_model_folder,
    load_params,
    read_model_config,
)
from moddistill.training.stages import stage_of
from moddistill.training.state import cast_frozen

LOG = logging.getLogger("moddistill")

RANDOM = "random:"


def student_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of the student's folder, or `config.tokenizer` for a random student."""
    if not config.student.startswith(RANDOM):
        if config.tokenizer:
            raise ValueError(
                f"config.tokenizer is {config.tokenizer!r}, but the student {config.student!r} "
                "brings its own; accepted: an empty string"
            )
        with at_field("config.student"):
            folder = as_model_folder(config.student)
            read_model_config(folder)
            return load_tokenizer(str(folder))
    if not config.tokenizer:
        raise ValueError(
            f"config.tokenizer is empty; a student with new weights ({config.student!r}) needs a "
            "tokenizer folder"
        )
    with at_field("config.tokenizer"):
        return load_tokenizer(config.tokenizer)


def architecture(spec: str, tokenizer: Tokenizer) -> ModelConfig:
    """The architecture of a model folder, a Hugging Face folder or `random:PRESET`."""
    if spec.startswith(RANDOM):
        config = preset(spec.removeprefix(RANDOM))
        return with_vocabulary(config, tokenizer.real_ids, tokenizer.image_id)
    return read_model_config(as_model_folder(spec))


def student_architectures(
    config: TrainConfig, tokenizer: Tokenizer
) -> tuple[ModelConfig, ModelConfig]:
    """What `config.student` holds, and what the stage trains."""
    with at_field("config.student"):
        base = architecture(config.student, tokenizer)
    with at_field("config.vision"):
        tower = architecture(config.vision, tokenizer) if config.vision else None
    return base, trained_architecture(config, base, tower)


def trained_architecture(
    config: TrainConfig, base: ModelConfig, tower: ModelConfig | None
) -> ModelConfig:
    """The student with the stage's template, the tower of another model, and its experts."""
    target = dataclasses.replace(base, template=config.data.template)
    if tower is not None:
        if base.vision is not None:
            raise ValueError(
                f"config.vision is {config.vision!r}, but the student {config.student!r} has a "
                "tower already; accepted: an empty string"
            )
        if tower.vision is None:
            raise ValueError(
                f"config.vision is {config.vision!r}, which has no vision encoder; accepted: a "
                "model with one"
            )
        is_new = config.student.startswith(RANDOM)
        if not is_new and base.image_token >= base.decoder.vocab_size:
            raise ValueError(
                f"config.student is {config.student!r}, in which <image> is id {base.image_token} "
                f"and the embedding has {base.decoder.vocab_size} rows; accepted: a student that "
                "was imported with --vision, which adds the row"
            )
        target = dataclasses.replace(target, vision=tower.vision)
    if not stage_of(config).sparse:
        return target
    with at_field("config.student" if base.decoder.moe else "config.moe"):
        return upcycle_config(target, config.moe)


def student_params(
    config: TrainConfig, base: ModelConfig, target: ModelConfig, mesh: Mesh
) -> dict[str, Any]:
    """The parameters of `target` before the first step, deterministic in `config.seed`."""
    init_rng, tower_rng, router_rng = jax.random.split(jax.random.key(config.seed), 3)
    with at_field("config.student"):
        params = spec_params(config.student, base, mesh, init_rng)
    if config.vision:
        new = random_params(dataclasses.replace(base, vision=target.vision), mesh, tower_rng)
        params |= {"vision": new["vision"], "projector": new["projector"]}
        if not config.vision.startswith(RANDOM):
            with at_field("config.vision"):
                params |= _vision_params(config.vision, mesh)
    if target.decoder.moe != base.decoder.moe:
        make = jax.jit(
            lambda params: upcycle(params, target, router_rng),
            out_shardings=param_shardings(mesh, abstract_params(target)),
        )
        params = make(params)
    return params


def _vision_params(spec: str, mesh: Mesh) -> dict[str, Any]:
    """`{"vision": ...}` of a model folder, as stored."""
    folder = as_model_folder(spec)
    config = read_model_config(folder)
    shardings = param_shardings(mesh, abstract_params(config))
    return load_params(folder, config, shardings=shardings, part="vision")


def spec_params(spec: str, config: ModelConfig, mesh: Mesh, rng: jax.Array) -> dict[str, Any]:
    """Parameters of a model folder as they are stored, or new ones."""
    if spec.startswith(RANDOM):
        return random_params(config, mesh, rng)
    shardings = param_shardings(mesh, abstract_params(config))
    return load_params(as_model_folder(spec), config, shardings=shardings)


def random_params(config: ModelConfig, mesh: Mesh, rng: jax.Array) -> dict[str, Any]:
    """New float32 parameters, made in their shards."""
    shardings = param_shardings(mesh, abstract_params(config))

    def init(rng: jax.Array) -> dict[str, Any]:
        return unbox(Vlm(config).init(rng, dummy_batch(config)))["params"]

    return jax.jit(init, out_shardings=shardings)(rng)


def teacher_architecture(
    config: TrainConfig, student: ModelConfig, tokenizer: Tokenizer
) -> ModelConfig | None:
    """The teacher's architecture, if there is one; ValueError if it does not fit the student.

    Its `real_ids` are those that it shares with the student.
    """
    if not config.teacher:
        return None
    with at_field("config.teacher"):
        teacher = architecture(config.teacher, tokenizer)
        check_teacher(teacher, student, config.teacher)
        if config.teacher.startswith(RANDOM):
            return teacher
        check_template(config, teacher.template)
        theirs = load_tokenizer(str(as_model_folder(config.teacher)))
        shared = _shared_ids(theirs, tokenizer, config.teacher)
    decoder = dataclasses.replace(teacher.decoder, real_ids=shared)
    return dataclasses.replace(teacher, decoder=decoder)


def check_template(config: TrainConfig, trained_with: str) -> None:
    """Raises ValueError unless records are rendered in the template that the teacher knows.

    In another one its distributions are those of text that it was never trained on.
    """
    if config.data.template != trained_with:
        raise ValueError(
            f"config.data.template is {config.data.template!r}, but the template of the teacher "
            f"{config.teacher!r} is {trained_with!r}; accepted: {trained_with!r}, or the teacher "
            f"imported with --template {config.data.template}"
        )


def warn_of_template(config: TrainConfig, base: ModelConfig) -> None:
    """Logs a warning if a trained student is distilled in another template than its own."""
    trained = config.teacher and not config.student.startswith(RANDOM)
    if trained and base.template != config.data.template:
        LOG.warning(
            "config.data.template is %r, but the student %r was trained with %r: it learns the "
            "other format in this stage, and its model folder will name that",
            config.data.template,
            config.student,
            base.template,
        )


def load_teacher(
    config: TrainConfig, teacher: ModelConfig, shapes: Any, mesh: Mesh
) -> dict[str, Any]:
    """The teacher's parameters in `shapes`, read straight into their shards and dtypes."""
    dtype = jnp.dtype(config.dtype)
    if config.teacher.startswith(RANDOM):
        params = random_params(teacher, mesh, jax.random.key(config.seed + 1))
        return pack_all(cast_frozen(params, dtype), shapes)
    read = unpacked_shapes(shapes, dtype)
    with at_field("config.teacher"):
        params = load_params(
            as_model_folder(config.teacher),
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
    """Raises ValueError unless both models read the same tokens and images of the same size."""
    pairs = {
        "image token": (teacher.image_token, student.image_token),
    }
    if student.vision is not None and teacher.vision is None:
        raise ValueError(f"teacher {origin!r} has no vision tower, the student has one")
    if student.vision is not None:
        pairs["positions an image"] = (teacher.vision.patches, student.vision.patches)
        pairs["image size"] = (teacher.vision.image_size, student.vision.image_size)
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(
                f"teacher {origin!r} does not fit: {name} {theirs}, the student's {ours}; "
                "accepted: a teacher with the student's tokenizer and image positions"
            )


def _shared_ids(teacher: Tokenizer, student: Tokenizer, origin: str) -> IdRanges:
    """Ids of the tokens that both have; losses compare the two models on these.

    A control token that no template uses may be missing on one side: no sample contains it.

    Raises:
      ValueError: if another token is missing on one side, or one has two ids.
    """
    theirs, ours = teacher.backend.get_vocab(), student.backend.get_vocab()
    optional = (teacher.special_tokens | student.special_tokens) - set(CONTROLS)
    one_sided = {token for token in optional if token not in theirs or token not in ours}
    different = [
        token
        for token in (theirs.keys() | ours.keys()) - one_sided
        if theirs.get(token) != ours.get(token)
    ]
    if different:
        token = min(different)
        raise ValueError(
            f"teacher {origin!r} has another vocabulary: token {token!r} is {theirs.get(token)} "
            f"there and {ours.get(token)} in the student; accepted: equal token ids"
        )
    same = {i for token, i in ours.items() if theirs.get(token) == i}
    return id_ranges(same - {student.image_id})
