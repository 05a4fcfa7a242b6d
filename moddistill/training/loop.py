"""The training loop."""

import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging as absl_logging
from flax import linen as nn
from jax.sharding import Mesh

from moddistill.config import DataConfig, TrainConfig
from moddistill.data.examples import ExampleSpec
from moddistill.data.images import PAD_COLOR, mean_color
from moddistill.data.pipeline import make_dataset
from moddistill.data.quarantine import Quarantine
from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed import sharding
from moddistill.distributed.accelerators import peak_flops
from moddistill.distributed.processes import barrier, check_equal_on_all_processes, is_main_process
from moddistill.errors import at_field
from moddistill.losses import Loss
from moddistill.models.flops import StepFlops, step_flops
from moddistill.models.moe.grouped_matmul import form
from moddistill.models.vlm import ModelConfig, Vlm
from moddistill.params import count, merge
from moddistill.storage.atomic_dir import check_replaceable
from moddistill.storage.model_folder import read_source, save_model
from moddistill.teachers.live import (
    load_teacher,
    same_tower,
    shares_tower,
    teacher_architecture,
    without_tower,
)
from moddistill.training import checkpoint
from moddistill.training.loading import (
    student_architectures,
    student_params,
    student_tokenizer,
    warn_of_template,
)
from moddistill.training.metrics import MetricsLog, weighted_means
from moddistill.training.optim import schedule
from moddistill.training.program import make_program, step_size
from moddistill.training.provenance import check_models, write_models
from moddistill.training.stages import stage_of
from moddistill.training.state import State
from moddistill.training.validation import (
    check_is_workdir,
    check_settings,
    check_spread,
    check_workdir,
    last_step,
    write_settings,
)

LOG = logging.getLogger("moddistill")


# Where the pipeline notes records, and what happened to them.
_NOTED = {"quarantine.jsonl": "left out", "cut.jsonl": "cut at max_length"}


class Streams(NamedTuple):
    """This process's share of the batches, as numpy arrays."""

    training: Iterator[Any]  # its position can be saved
    heldout: Iterator[Any] | None


class Run(NamedTuple):
    """Model, loss and state, on the mesh."""

    model: Vlm
    loss: Loss
    step: Callable[..., Any]
    state: State
    teacher: dict[str, Any] | None
    flops: StepFlops


def train(config: TrainConfig, workdir: Path) -> Path:
    """Runs or resumes one stage and returns the model folder it wrote.

    Raises:
      UserError: for settings, records or models that do not fit.
      DivergedError: when a metric is no longer finite.
    """
    check_settings(config)
    check_equal_on_all_processes("settings", repr((config, workdir)))
    result = workdir / "model"
    check_is_workdir(workdir)
    changes = check_workdir(config, workdir)
    if result.exists() and read_source(result).get("steps") == config.steps:
        LOG.info("%s is finished: %s", config.stage, result)
        return result
    resumes = last_step(workdir) is not None
    if resumes:
        check_models(config, workdir)
    check_replaceable(result, "train")  # before the steps, after which `save_model` does
    for change in changes:
        LOG.info("resumed with another setting: %s", change)
    if is_main_process() and not resumes:
        for name in _NOTED:  # by a run that left no checkpoint
            (workdir / name).unlink(missing_ok=True)
    barrier("reading the workdir")
    with at_field("config.mesh"):
        mesh = sharding.make_mesh(config.mesh)
    check_spread(config, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
        tokenizer = student_tokenizer(config)
        write_settings(config, workdir)  # before any other file of the workdir
        if not resumes:
            write_models(config, workdir)
        streams = open_streams(config, tokenizer, workdir)
        run = prepare(config, tokenizer, mesh)
        state = _loop(config, run, streams, mesh, workdir)
        params = merge(state.params, state.frozen)
        save_model(result, run.model.config, params, tokenizer, dataclasses.asdict(config))
        barrier("writing the model")
    return result


def prepare(config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> Run:
    """The compiled step's function, the state before the first step, the teacher's parameters."""
    base, target = student_architectures(config, tokenizer)
    warn_of_template(config, base)
    teacher = teacher_architecture(config, target, tokenizer)
    program = make_program(config, target, teacher, mesh)
    teacher_params = None
    if teacher is not None:
        teacher_params = load_teacher(config, teacher, program.teacher, mesh)
    params = student_params(config, base, target, mesh)
    make = jax.jit(program.make_state, out_shardings=program.places, donate_argnums=0)
    with warnings.catch_warnings():
        # Parameters that change their dtype cannot hand on their memory.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        state = make(params)
    LOG.info(
        "%s: %s parameters, %s of them train",
        config.stage,
        f"{count(state.params) + count(state.frozen):,}",
        f"{count(state.params):,}",
    )
    if target.decoder.moe is not None:
        LOG.info("experts are computed by %s", form())
    shared = shares_tower(target, teacher, state.params) and same_tower(
        state.frozen, teacher_params
    )
    if shared:
        LOG.info("the teacher takes the features of the student's tower, which is the same")
        teacher_params = without_tower(teacher_params)
    flops = step_flops(target, teacher, step_size(config, target), set(state.params), shared)
    return Run(program.model, program.loss, program.step, state, teacher_params, flops)


def open_streams(config: TrainConfig, tokenizer: Tokenizer, workdir: Path) -> Streams:
    """Opens all records of a run, before any model takes time to load."""
    _, target = student_architectures(config, tokenizer)
    make = functools.partial(_batches, config, model=target, tokenizer=tokenizer, workdir=workdir)
    training = make(config.data, origin="config.data.sources")
    if not config.heldout_steps:
        return Streams(training, None)
    heldout = dataclasses.replace(config.data, sources={"heldout": config.data.heldout})
    return Streams(training, make(heldout, origin="config.data"))


def _batches(
    config: TrainConfig,
    data: DataConfig,
    *,
    model: ModelConfig,
    tokenizer: Tokenizer,
    workdir: Path,
    origin: str,
) -> Iterator[Any]:
    tower = model.vision
    spec = ExampleSpec(
        template=data.template,
        max_length=data.max_length,
        max_images=data.max_images,
        image_size=tower.image_size if tower else 0,
        image_tokens=tower.patches if tower else 0,
        pad_color=mean_color(tower.mean) if tower else PAD_COLOR,
    )
    dataset = make_dataset(
        data,
        spec,
        tokenizer,
        kind=stage_of(config).records,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        quarantine_path=str(workdir / "quarantine.jsonl"),
        origin=origin,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return iter(dataset)


def _loop(config: TrainConfig, run: Run, streams: Streams, mesh: Mesh, workdir: Path) -> State:
    """Steps until `config.steps`, from the newest checkpoint if there is one."""
    records = streams.training
    learning_rate = schedule(config.optim, config.steps)
    with checkpoint.open_checkpoints(workdir / "checkpoints") as checkpoints:
        state = run.state
        if checkpoints.latest is not None:
            state = checkpoint.restore(checkpoints, state, records)
            LOG.info("resumed at step %d", state.step)
        start = int(state.step)
        peak = peak_flops(list(mesh.devices.flat))
        with MetricsLog(workdir, start, config.steps, config.stage, run.flops, peak) as log:
            for step in range(start + 1, config.steps + 1):
                with _profiled(step, start, config, workdir):
                    batch = sharding.put_batch(mesh, next(records))
                    state, metrics = run.step(state, run.teacher, batch)
                    if step in config.profile_steps:
                        jax.block_until_ready(metrics)
                log.add(metrics)
                last = step == config.steps
                if last or step % config.log_every == 0 or step % config.save_every == 0:
                    log.report(step, float(learning_rate(step - 1)), _last_good(checkpoints))
                if last or step % config.save_every == 0:
                    checkpoint.save(checkpoints, state, records)
            if streams.heldout is not None:
                means = measure(config, run, state, streams.heldout, mesh)
                log.write({"step": config.steps} | means)
    _warn_of_records(workdir)
    return state


@contextlib.contextmanager
def _profiled(step: int, start: int, config: TrainConfig, workdir: Path) -> Iterator[None]:
    """The step inside the profiler's trace, if it is one of `profile_steps` behind `start`.

    The trace lies in `profile/` of the workdir, for TensorBoard or Perfetto.
    """
    first, last = config.profile_steps or (0, 0)
    if step == max(first, start + 1) and step <= last:
        jax.profiler.start_trace(workdir / "profile")
    yield
    if step == last:
        jax.profiler.stop_trace()


def _warn_of_records(workdir: Path) -> None:
    for name, what in _NOTED.items():
        noted = Quarantine(str(workdir / name))
        if noted.count:
            LOG.warning("%d records %s: %s", noted.count, what, noted.path)


def measure(
    config: TrainConfig, run: Run, state: State, records: Iterator[Any], mesh: Mesh
) -> dict[str, float]:
    """Means of the stage's metrics over `heldout_steps` batches of held-out records."""
    loss = jax.jit(run.loss.__call__)
    rng = jax.random.key(config.seed)
    metrics = []
    for _ in range(config.heldout_steps):
        for part in _micro_batches(next(records), config.accumulate):
            batch = sharding.put_batch(mesh, part)
            metrics.append(loss(state.params, state.frozen, run.teacher, batch, rng)[1])
    means = weighted_means(jax.device_get(metrics))
    means = {f"heldout_{name}": mean for name, mean in means.items()}
    LOG.info("held out: %s", ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    return means


def _micro_batches(batch: Any, count: int) -> Iterator[Any]:
    """Equal parts of a batch: what fits while training fits here."""
    for i in range(count):
        yield jax.tree.map(lambda x, i=i: np.split(x, count)[i], batch)


def _last_good(checkpoints: checkpoint.Checkpoints) -> str:
    latest = checkpoints.latest
    return "none yet" if latest is None else str(checkpoints.directory / str(latest))


def start_logging() -> None:
    """Logs to stderr: this library from INFO on (main process), all others from WARNING on."""
    logging.basicConfig(
        format="%(levelname).1s%(asctime)s %(filename)s:%(lineno)d] %(message)s",
        datefmt="%m%d %H:%M:%S",
    )
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax and grain
    LOG.setLevel(logging.INFO if is_main_process() else logging.WARNING)
