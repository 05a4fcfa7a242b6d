"""The jitted step of a stage, from its architectures: no array is made here.

Training runs it on parameters; planning compiles it for devices that are only described.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moddistill.config import TrainConfig
from moddistill.distributed import sharding
from moddistill.errors import invalid
from moddistill.losses import Loss
from moddistill.models.batch import image_slots
from moddistill.models.compute import ComputeConfig
from moddistill.models.flops import StepSize
from moddistill.models.quantization import stored_shapes
from moddistill.models.vlm import ModelConfig, Vlm, abstract_params
from moddistill.params import cast_frozen, flatten
from moddistill.teachers.cached import CachedTeacher
from moddistill.teachers.live import LiveTeacher, OwnLayout
from moddistill.training.optim import make_optimizer
from moddistill.training.stages import stage_of, trainable_paths
from moddistill.training.state import State, make_state, make_state_shardings
from moddistill.training.step import Divergence, make_step

SUPERVISED_SHARE = 0.25  # of the positions, about that of LLaVA's data


def full_step_size(
    config: TrainConfig, student: ModelConfig, teacher: ModelConfig | None = None
) -> StepSize:
    """Size of one step of a stage whose rows are all full: all that its kernels compute.

    A row counts as one sample, since attention computes its scores between samples too.

    Args:
      teacher: a live one. If it reads images as more tokens, its rows are full.
    """
    sides = sides_of_stage(config)  # which share their images
    rows = config.batch_size * sides
    tokens = rows * config.data.max_length
    images = 0
    if student.vision is not None:
        patches = student.vision.patches
        most = patches if teacher is None else max(patches, teacher.vision.patches)
        images = config.batch_size * image_slots(config.data, most)
        tokens -= images * sides * (most - patches)
    supervised = round(tokens * SUPERVISED_SHARE)
    return StepSize(tokens, tokens**2 / rows, images, supervised)


def sides_of_stage(config: TrainConfig) -> int:
    """Returns the number of answers of a record that are read: both of a pair."""
    return 2 if stage_of(config).records == "preference" else 1


class Program(NamedTuple):
    """A stage on a mesh.

    Attributes:
      model: the student.
      loss: of the stage.
      step: `state, metrics = step(state, teacher, batch)`, jitted; donates the state.
      make_state: from all parameters to the state, to be jitted with `state_shardings`.
      abstract_state: shapes and dtypes of the state.
      state_shardings: its shardings.
      teacher: shapes of the teacher's parameters with their shardings, or None.
    """

    model: Vlm
    loss: Loss
    step: Callable[..., Any]
    make_state: Callable[[Any], State]
    abstract_state: State
    state_shardings: State
    teacher: Any


def make_program(
    config: TrainConfig,
    student: ModelConfig,
    teacher: ModelConfig | CachedTeacher | None,
    mesh: Mesh,
    layout: OwnLayout | None = None,
) -> Program:
    """Builds model, loss, step and shardings of a stage.

    Args:
      student: the architecture that the stage trains.
      teacher: of a live teacher its architecture; None for a stage without one.
      layout: of a live teacher, if it is not that of the student.

    Raises:
      UserError: for a mesh that does not divide the parameters, or lacks `expert_transport`.
    """
    compute = compute_config(config)
    model = Vlm(student, compute)
    boxed = _abstract_params(config, student, mesh, "student")
    params = sharding.unbox(boxed)
    trainable = trainable_paths(config, list(flatten(params)))
    optimizer = make_optimizer(config.optim, config.steps)

    def make(params: Any) -> State:
        return make_state(params, trainable, optimizer, compute.dtype)

    replicated = sharding.replicated(mesh)
    # Shapes first: shardings of moments follow from the abstract state, and the step is jitted
    # with these before any array exists.
    state = jax.eval_shape(make, params)
    param_shardings = flatten(sharding.param_shardings(mesh, boxed))
    shardings = make_state_shardings(state, param_shardings, optimizer, replicated)
    # Layers in host memory are fetched like quantized ones: one at a time, inside the scan.
    by_layer = config.teacher_quantization != "none" or config.teacher_offload
    compute = dataclasses.replace(compute, quantized_layers=by_layer)
    is_live = isinstance(teacher, ModelConfig)
    if is_live:
        live = LiveTeacher(Vlm(teacher, compute), config.logits_chunk_size, layout)
    loss = stage_of(config).loss(config, model, live if is_live else teacher)
    divergence = Divergence(config.divergence_factor, config.on_divergence == "skip")
    # Donation: state and new state have equal shardings, so XLA reuses each buffer in place and
    # parameters and moments exist once. The teacher is an argument of its own and stays.
    step = jax.jit(
        make_step(loss, optimizer, config.grad_accum_steps, config.seed, student, divergence),
        donate_argnums=(0,) if config.donate else (),
        out_shardings=(shardings, replicated),
    )
    frozen = teacher_shapes(config, teacher, mesh) if is_live else None
    return Program(model, loss, step, make, state, shardings, frozen)


def compute_config(config: TrainConfig) -> ComputeConfig:
    """Returns the settings by which a run computes its student."""
    return ComputeConfig(
        one_segment=not config.data.packing,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        unroll=not config.scan,
        expert_transport=config.expert_transport,
    )


def _abstract_params(config: TrainConfig, model: ModelConfig, mesh: Mesh, whose: str) -> Any:
    """`abstract_params` of a model; UserError unless it can be sharded over the mesh."""
    platform = mesh.devices.flat[0].platform
    is_ragged = model.decoder.moe is not None and config.expert_transport == "ragged"
    if is_ragged and platform == "cpu" and mesh.size > 1:
        expected = f"'all_gather' or 'all_to_all' on {mesh.size} CPUs, for the {whose} has experts"
        raise invalid("config.expert_transport", config.expert_transport, expected)
    boxed = abstract_params(model)
    sharding.check_divisible(mesh, boxed, whose)
    return boxed


def teacher_shapes(config: TrainConfig, teacher: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Returns shapes of a teacher's parameters with their shardings, as they are stored."""
    boxed = _abstract_params(config, teacher, mesh, "teacher")
    dtype = jnp.dtype(config.dtype)
    shapes = jax.eval_shape(lambda p: cast_frozen(p, dtype), sharding.unbox(boxed))
    shapes = with_shardings(shapes, sharding.param_shardings(mesh, boxed))
    return stored_shapes(shapes, config.teacher_quantization, config.teacher_offload)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns abstract arrays with their shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
