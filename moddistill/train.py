"""Trains one stage.

    python -m moddistill.train --config experiments/d2d.py --workdir runs/d2d

The same command again resumes a run that was cut off, bit for bit; a finished one is left alone.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from absl import logging as absl_logging
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from orbax.checkpoint import v1 as ocp

from moddistill import checkpoint, sharding
from moddistill.config import DataConfig, TrainConfig, from_config_dict
from moddistill.data.examples import ExampleSpec
from moddistill.data.pipeline import make_dataset
from moddistill.data.records import Quarantine
from moddistill.data.tokenizer import Tokenizer
from moddistill.initial import (
    load_teacher,
    student_architectures,
    student_params,
    student_tokenizer,
)
from moddistill.metrics import MetricsLog, check_finite, weighted_means
from moddistill.model_folder import abstract_params, save_model
from moddistill.models.vlm import ModelConfig, Vlm
from moddistill.optim import make_optimizer, schedule
from moddistill.stages import stage_of, trainable_patterns
from moddistill.state import State, make_state, state_shardings
from moddistill.step import LossFn, make_step
from moddistill.tree import count, flatten, match, merge

LOG = logging.getLogger("moddistill")

# Settings that may change between a run and its resumption.
_FREE = ("log_every", "save_every")


class Run(NamedTuple):
    """All that the loop needs, on the mesh."""

    model: Vlm
    loss_fn: LossFn
    step: Callable[..., Any]
    state: State
    teacher: dict[str, Any] | None


def train(config: TrainConfig, workdir: Path) -> Path:
    """Runs or resumes one stage and returns the model folder it wrote.

    Raises:
      ValueError: for settings, records or models that do not fit.
      FloatingPointError: when a metric is no longer finite.
    """
    stage_of(config)
    _check_batch(config)
    result = workdir / "model"
    _check_config(config, workdir)
    if result.exists():
        LOG.info("%s is finished: %s", config.stage, result)
        return result
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
        tokenizer = student_tokenizer(config)
        run = prepare(config, tokenizer, mesh)
        _write_config(config, workdir)
        state = _loop(config, run, tokenizer, mesh, workdir)
        params = merge(state.params, state.frozen)
        save_model(result, run.model.config, params, tokenizer, dataclasses.asdict(config))
    return result


def prepare(config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> Run:
    """Models, the state before the first step, and the compiled step's function."""
    stage = stage_of(config)
    base, target = student_architectures(config, stage, tokenizer)
    dtype = jnp.dtype(config.dtype)
    model = Vlm(target, dtype, config.remat)
    teacher, teacher_params = None, None
    if stage.teacher:
        teacher, teacher_params = load_teacher(config, target, tokenizer, mesh)
    params = student_params(config, base, target, mesh)
    trainable = match(list(flatten(params)), trainable_patterns(config), "config.trainable")
    optimizer = make_optimizer(config.optim, config.steps)

    def make(params: dict[str, Any]) -> State:
        return make_state(params, trainable, optimizer, dtype)

    everywhere = sharding.replicated(mesh)
    param_places = flatten(sharding.param_shardings(mesh, abstract_params(target)))
    places = state_shardings(jax.eval_shape(make, params), param_places, optimizer, everywhere)
    state = jax.jit(make, out_shardings=places)(params)
    LOG.info(
        "%s: %s parameters, %s of them train",
        config.stage,
        f"{count(params):,}",
        f"{count(state.params):,}",
    )
    loss_fn = stage.loss(model, teacher, config.loss)
    step = jax.jit(
        make_step(loss_fn, optimizer, config.accumulate, config.seed),
        donate_argnums=0,
        out_shardings=(places, everywhere),
    )
    return Run(model, loss_fn, step, state, teacher_params)


def batches(
    config: TrainConfig, data: DataConfig, model: ModelConfig, tokenizer: Tokenizer, workdir: Path
) -> Iterator[Any]:
    """This process's share of the batches, as numpy arrays, from a savable position."""
    tower = model.vision
    spec = ExampleSpec(
        template=data.template,
        max_length=data.max_length,
        max_images=data.max_images,
        image_size=tower.image_size if tower else 0,
        image_tokens=tower.patches if tower else 0,
    )
    dataset = make_dataset(
        data,
        spec,
        tokenizer,
        kind=stage_of(config).records,
        batch_size=config.batch_size // jax.process_count(),
        seed=config.seed,
        quarantine_path=str(workdir / "quarantine.jsonl"),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return iter(dataset)


def _loop(config: TrainConfig, run: Run, tokenizer: Tokenizer, mesh: Mesh, workdir: Path) -> State:
    """Steps until `config.steps`, from the newest checkpoint if there is one."""
    records = batches(config, config.data, run.model.config, tokenizer, workdir)
    learning_rate = schedule(config.optim, config.steps)
    with checkpoint.open_checkpoints(workdir / "checkpoints") as checkpoints:
        state = run.state
        if checkpoints.latest is not None:
            state = checkpoint.restore(checkpoints, state, records)
            LOG.info("resumed at step %d", state.step)
        start = int(state.step)
        with MetricsLog(workdir, start, config.steps, config.stage) as log:
            for step in range(start + 1, config.steps + 1):
                batch = sharding.put_batch(mesh, next(records))
                state, metrics = run.step(state, run.teacher, batch)
                log.add(metrics)
                last = step == config.steps
                if last or step % config.log_every == 0 or step % config.save_every == 0:
                    row = log.report(step, float(learning_rate(step - 1)))
                    check_finite(row, step, _last_good(checkpoints))
                if last or step % config.save_every == 0:
                    checkpoint.save(checkpoints, state, records)
            if config.heldout_steps:
                log.write(
                    {"step": config.steps} | heldout(config, run, state, tokenizer, mesh, workdir)
                )
    quarantined = Quarantine(str(workdir / "quarantine.jsonl"))
    if quarantined.count:
        LOG.warning("%d records left out: %s", quarantined.count, quarantined.path)
    return state


def heldout(
    config: TrainConfig, run: Run, state: State, tokenizer: Tokenizer, mesh: Mesh, workdir: Path
) -> dict[str, float]:
    """Means of the stage's metrics over `heldout_steps` batches of `config.data.heldout`."""
    data = dataclasses.replace(config.data, sources={"heldout": config.data.heldout})
    records = batches(config, data, run.model.config, tokenizer, workdir)
    measure = jax.jit(run.loss_fn)
    rng = jax.random.key(config.seed)
    metrics = []
    for _ in range(config.heldout_steps):
        batch = sharding.put_batch(mesh, next(records))
        metrics.append(measure(state.params, state.frozen, run.teacher, batch, rng)[1])
    means = {f"heldout_{name}": mean for name, mean in weighted_means(metrics).items()}
    LOG.info("held out: %s", ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    return means


def _check_batch(config: TrainConfig) -> None:
    pieces = config.accumulate * jax.process_count()
    if config.batch_size % pieces:
        raise ValueError(
            f"config.batch_size is {config.batch_size}; accepted: a multiple of accumulate times "
            f"the number of processes, {pieces}"
        )


def _last_good(checkpoints: ocp.training.Checkpointer) -> str:
    latest = checkpoints.latest
    return "none yet" if latest is None else str(checkpoints.directory / str(latest.step))


def _check_config(config: TrainConfig, workdir: Path) -> None:
    """Raises ValueError if the workdir belongs to a run with other settings."""
    file = workdir / "config.json"
    ours = json.loads(json.dumps(dataclasses.asdict(config)))
    if file.is_file():
        theirs = json.loads(file.read_text())
        changed = [
            f"{key}: {theirs.get(key)!r} there, {value!r} now"
            for key, value in ours.items()
            if key not in _FREE and theirs.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"{workdir} holds a run with other settings ({'; '.join(changed)}); accepted: the "
                "same settings to resume it, or another --workdir"
            )


def _write_config(config: TrainConfig, workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    (workdir / "config.json").write_text(text)


def start_logging() -> None:
    """Our own messages from INFO on, those of libraries from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    LOG.setLevel(logging.INFO)


def main(values: ConfigDict, workdir: str) -> None:
    """Entry point of `python -m moddistill.train`."""
    start_logging()
    train(from_config_dict(TrainConfig, values.to_dict()), Path(workdir))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="Experiment file.")
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    app.run(lambda _: main(_CONFIG.value, _WORKDIR.value))
