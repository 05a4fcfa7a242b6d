"""Loading of a run: student and teacher into their shards, and the first state."""

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moddistill.config import TrainConfig
from moddistill.convert.resolve import (
    ResolvedModel,
    load_or_init,
    random_params,
)
from moddistill.data.token_texts import texts_in_template
from moddistill.distributed.sharding import param_shardings
from moddistill.errors import at_field
from moddistill.inference.answer import end_id
from moddistill.losses import Loss
from moddistill.models.flops import StepFlops, StepSize, step_flops
from moddistill.models.moe.grouped_matmul import kernel_name
from moddistill.models.upcycle import upcycle
from moddistill.models.vlm import Vlm, abstract_params
from moddistill.models.vocabulary import common_ids
from moddistill.params import count
from moddistill.storage.model_folder import load_params
from moddistill.teachers.cached import CachedTeacher
from moddistill.teachers.live import (
    OwnLayout,
    load_teacher,
    same_tower,
    shares_tower,
    without_tower,
)
from moddistill.training.architectures import Models
from moddistill.training.on_policy import make_answer, with_answers_of_the_student
from moddistill.training.program import Program, make_program, sides_of_stage
from moddistill.training.state import State

LOG = logging.getLogger("moddistill")


class Run(NamedTuple):
    """Everything that a run computes with, on the mesh.

    Attributes:
      model: the student.
      loss: of the stage.
      step: `state, metrics = step(state, teacher, batch)`, jitted; donates the state. On-policy, it
        is two jitted functions, of which the first answers a share of the batch.
      state: before the first step.
      teacher: the teacher's parameters, or None; without its vision encoder if that is shared.
      flops: from the content of a step to its FLOPs.
    """

    model: Vlm
    loss: Loss
    step: Callable[..., Any]
    state: State
    teacher: dict[str, Any] | None
    flops: Callable[[StepSize], StepFlops]


def prepare(config: TrainConfig, models: Models, mesh: Mesh) -> Run:
    """Loads or initialises all parameters of a run, sharded over the mesh, and its step."""
    target, teacher = models.student_config, models.teacher_config
    cached = None
    if models.cache is not None:
        ids, all_ids = models.ids, models.tokenizer.real_ids
        cached = CachedTeacher(
            models.cache.shape.kind,
            ids.ids_of_student() if ids.is_shared else all_ids,
            ids.classes,
        )
    program = make_program(config, target, cached or teacher, mesh, _own_layout(models))
    teacher_params = None
    if teacher is not None:
        teacher_params = load_teacher(config, models.teacher.folder, teacher, program.teacher, mesh)
        if models.has_own_layout:
            LOG.info(
                "the teacher reads records in its own form: template %r, %d tokens per image",
                teacher.template,
                teacher.vision.patches if target.vision else 0,
            )
    state = _first_state(program, student_params(config, models, mesh))
    total = count(state.params) + count(state.frozen)
    LOG.info(
        "%s: %s parameters, %s trainable", config.stage, f"{total:,}", f"{count(state.params):,}"
    )
    if target.decoder.moe is not None:
        LOG.info("experts are computed by a %s", kernel_name())
    # With one frozen encoder in both models, its features are computed once per step, and the
    # teacher's copy of its weights is freed.
    shared = shares_tower(target, teacher, state.params) and same_tower(
        state.frozen, teacher_params
    )
    if shared:
        LOG.info("the teacher gets the features of the student's vision encoder, which is the same")
        teacher_params = without_tower(teacher_params)
    step = program.step
    if config.on_policy.share:
        ids = common_ids(target.decoder.real_ids, teacher.decoder.real_ids)
        end = end_id(config.data.template, models.tokenizer)
        answer = make_answer(config, program.model, ids, end, mesh)
        step = with_answers_of_the_student(answer, step)
    trained = set(state.params)
    flops = functools.partial(
        step_flops,
        target,
        teacher,
        trained=trained,
        shared_tower=shared,
        image_logits=config.distillation.image_kd_weight > 0,
        sides=sides_of_stage(config),
        answered=config.on_policy.share,
    )
    return Run(program.model, program.loss, step, state, teacher_params, flops)


def _own_layout(models: Models) -> OwnLayout | None:
    """Returns how a live teacher reads the rows, if not in the tokens of the student."""
    if not models.has_own_layout:
        return None
    tokenizer = models.teacher_tokenizer
    ends = texts_in_template(tokenizer, models.teacher_config.template).end, models.texts.end
    differ = None not in ends and ends[0] != ends[1]
    return OwnLayout(tokenizer.real_ids, ends if differ else None)


def _first_state(program: Program, params: dict[str, Any]) -> State:
    """Makes the state of `params`, which it donates: they and the state never exist together."""
    make = jax.jit(program.make_state, out_shardings=program.state_shardings, donate_argnums=0)
    with warnings.catch_warnings():
        # A buffer whose parameter changes its dtype cannot be reused, and JAX warns of each.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return make(params)


def student_params(config: TrainConfig, models: Models, mesh: Mesh) -> dict[str, Any]:
    """The student's parameters before the first step, deterministic in `config.seed`."""
    # A key for each part, so that no part's weights depend on whether the others are initialised.
    init_rng, tower_rng, router_rng = jax.random.split(jax.random.key(config.seed), 3)
    base, target = models.student.config, models.student_config
    with at_field("config.student"):
        params = load_or_init(models.student, mesh, init_rng)
    if models.vision is not None:
        # A projector's input has the encoder's width, so a new encoder needs a new projector too.
        new = random_params(dataclasses.replace(base, vision=target.vision), mesh, tower_rng)
        params |= {"vision": new["vision"], "projector": new["projector"]}
        if models.vision.folder is not None:
            with at_field("config.vision"):
                params |= _vision_params(models.vision, mesh)
    if target.decoder.moe != base.decoder.moe:
        # Jitted with `out_shardings`, so that copies of experts are created in their shards.
        make = jax.jit(
            lambda params: upcycle(params, target, router_rng, config.upcycle),
            out_shardings=param_shardings(mesh, abstract_params(target)),
        )
        params = make(params)
    return params


def _vision_params(model: ResolvedModel, mesh: Mesh) -> dict[str, Any]:
    """`{"vision": ...}` of a model folder, as stored."""
    shardings = param_shardings(mesh, abstract_params(model.config))
    return load_params(model.folder, model.config, shardings=shardings, part="vision")
