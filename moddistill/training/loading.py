"""The models a stage begins with: architectures first, then parameters into their shards."""

import dataclasses
import logging
from typing import Any

import jax
from jax.sharding import Mesh

from moddistill.config import TrainConfig
from moddistill.convert.resolve import (
    RANDOM,
    architecture,
    as_model_folder,
    random_params,
    spec_params,
)
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.distributed.sharding import param_shardings
from moddistill.errors import UserError, at_field
from moddistill.models.upcycle import check_upcycle, upcycle, upcycle_config
from moddistill.models.vlm import ModelConfig, abstract_params
from moddistill.storage.model_folder import load_params, read_model_config
from moddistill.training.stages import stage_of

LOG = logging.getLogger("moddistill")


def student_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of the student's folder, or `config.tokenizer` for a random student."""
    if not config.student.startswith(RANDOM):
        if config.tokenizer:
            raise UserError(
                f"config.tokenizer is {config.tokenizer!r}, but the student {config.student!r} "
                "brings its own; accepted: an empty string"
            )
        with at_field("config.student"):
            folder = as_model_folder(config.student)
            read_model_config(folder)
            return load_tokenizer(str(folder))
    if not config.tokenizer:
        raise UserError(
            f"config.tokenizer is empty; a student with new weights ({config.student!r}) needs a "
            "tokenizer folder"
        )
    with at_field("config.tokenizer"):
        return load_tokenizer(config.tokenizer)


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
            raise UserError(
                f"config.vision is {config.vision!r}, but the student {config.student!r} has a "
                "tower already; accepted: an empty string"
            )
        if tower.vision is None:
            raise UserError(
                f"config.vision is {config.vision!r}, which has no vision encoder; accepted: a "
                "model with one"
            )
        is_new = config.student.startswith(RANDOM)
        if not is_new and base.image_token >= base.decoder.vocab_size:
            raise UserError(
                f"config.student is {config.student!r}, in which <image> is id {base.image_token} "
                f"and the embedding has {base.decoder.vocab_size} rows; accepted: a student that "
                "was imported with --vision, which adds the row"
            )
        target = dataclasses.replace(target, vision=tower.vision)
    if not stage_of(config).sparse:
        return target
    with at_field("config.upcycle"):
        check_upcycle(config.upcycle)
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
            lambda params: upcycle(params, target, router_rng, config.upcycle),
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
