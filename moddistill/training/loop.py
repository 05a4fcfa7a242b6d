"""The training loop."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from flax import linen as nn
from jax.sharding import Mesh

from moddistill.config import TrainConfig
from moddistill.distributed import sharding
from moddistill.distributed.accelerators import peak_flops
from moddistill.distributed.processes import barrier, check_equal_on_all_processes
from moddistill.errors import UserError, at_field
from moddistill.params import merge
from moddistill.storage.atomic_dir import check_replaceable
from moddistill.storage.digests import read_digests, verify
from moddistill.storage.model_folder import read_source, save_model
from moddistill.training import checkpoint
from moddistill.training.architectures import Models, resolve_models
from moddistill.training.heldout import Heldout
from moddistill.training.interruption import Stops, Waiting, until_signal
from moddistill.training.loading import Run, prepare
from moddistill.training.lock import locked
from moddistill.training.metrics import HELDOUT, MetricsLog
from moddistill.training.optim import schedule
from moddistill.training.provenance import (
    RUN,
    check_is_of_run,
    check_models,
    check_sources,
    run_id,
    write_models,
)
from moddistill.training.resume import (
    check_is_workdir,
    check_steps,
    check_workdir,
    is_finished,
    last_step,
    write_settings,
)
from moddistill.training.state import State
from moddistill.training.streams import (
    Streams,
    open_streams,
    remove_lists,
    warn_of_records,
    with_steps,
)
from moddistill.training.tasks import Tasks, read_questions
from moddistill.training.validation import check_batch_divides_mesh, check_settings

LOG = logging.getLogger("moddistill")


def train(config: TrainConfig, workdir: Path) -> Path:
    """Runs or resumes one stage and returns the model folder it wrote.

    Raises:
      UserError: for settings, records or models that do not fit.
      DivergedError: when a loss is no longer finite, or too large.
      StoppedError: after SIGTERM, when the last step is saved.
    """
    check_settings(config)
    check_equal_on_all_processes("settings", repr((config, workdir)))
    check_is_workdir(workdir)
    changes = check_workdir(config, workdir)
    result = workdir / "model"
    if result.exists() and is_finished(config, read_source(result)):
        check_is_of_run(result, workdir)
        expected = "an undamaged model, or none, which is then made again"
        verify(result, list(read_digests(result).files), expected=expected, shared=True)
        LOG.info("%s is finished: %s", config.stage, result)
        return result
    with locked(workdir):
        _train(config, workdir, changes)
    return result


def _train(config: TrainConfig, workdir: Path, changes: Sequence[str]) -> None:
    """Trains and writes `model`; logs the settings that change when a run resumes."""
    result = workdir / "model"
    check_replaceable(result, "train")  # `save_model` checks too, but after the last step
    for change in changes:
        LOG.info("resumed with another setting: %s", change)
    with at_field("config.mesh"):
        mesh = sharding.make_mesh(config.mesh)
    check_batch_divides_mesh(config, mesh)
    models = resolve_models(config)
    questions = read_questions(config)
    _begin(config, models, workdir)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(sharding.RULES.items())):
        streams = open_streams(config, models, mesh, workdir)
        check_sources(streams.digests, workdir)
        source = dataclasses.asdict(config) | {RUN: run_id(workdir)}
        config = with_steps(config, streams.plan)
        check_steps(config, workdir)
        run = prepare(config, models, mesh)
        tasks = (
            Tasks(config, questions, run.model, models.tokenizer, workdir) if questions else None
        )
        state = _loop(config, run, streams, tasks, mesh, workdir)
        params = merge(state.params, state.frozen)
        save_model(result, run.model.config, params, models.tokenizer, source)
        barrier("writing the model")


def _begin(config: TrainConfig, models: Models, workdir: Path) -> None:
    """Writes the settings and models of a run, or compares the models if it resumes."""
    resumes = last_step(workdir) is not None
    if resumes:
        check_models(models, workdir)
    else:
        remove_lists(workdir)
    # Until here processes read the settings, and none may add to the lists of records.
    barrier("reading the workdir")
    write_settings(config, workdir)  # before any other file, since it marks a workdir
    if not resumes:
        write_models(models, workdir)


def _loop(
    config: TrainConfig,
    run: Run,
    streams: Streams,
    tasks: Tasks | None,
    mesh: Mesh,
    workdir: Path,
) -> State:
    """Steps until `config.steps`, from the newest checkpoint if there is one.

    Raises:
      StoppedError: after a signal, with a checkpoint of the last step.
    """
    records = streams.training
    learning_rate = schedule(config.optim, config.steps)
    heldout = Heldout(config, run, streams.heldout, mesh) if streams.heldout else None
    with (
        checkpoint.open_checkpoints(workdir / "checkpoints", run_id(workdir)) as checkpoints,
        until_signal() as stops,
        contextlib.closing(records),
    ):
        # Restore order: `run.state` exists first, since a checkpoint lacks the frozen parameters
        # and is read into its shardings. The position of `records` is set before the first batch.
        state = run.state
        if checkpoints.latest is not None:
            state, next_row = checkpoint.restore(checkpoints, state)
            records.seek(next_row)
            LOG.info("resumed at step %d", state.step)
        start = int(state.step)
        if start == config.steps and stops.after(start):
            raise stops.error(f"{config.stage}: stopped after step {start}")
        with _open_log(config, run, mesh, workdir, start) as log:

            def report(step: int) -> None:
                log.report(step, float(learning_rate(step - 1)), _last_good(checkpoints))

            def save(step: int, state: State, next_row: int) -> None:
                report(step)  # so that no checkpoint holds a state that is not finite
                checkpoint.save(checkpoints, state, next_row, _keep(config, log))

            if start and _evaluate((heldout, tasks), log, start, state, stops):
                raise stops.error(f"{config.stage}: stopped after step {start}")
            for step in range(start + 1, config.steps + 1):
                with _profiled(step, start, config, workdir):
                    # The state is as good as before if the next records are bad.
                    unsaved = step > start + 1 and checkpoints.latest != step - 1
                    done = step - 1, state, records.next_row
                    with _saving(save if unsaved else None, done, stops):
                        rows = stops.wait(records.__next__)
                    batch = sharding.put_batch(mesh, rows)
                    if config.keep_best and step == start + 1:
                        heldout.check_name(config.keep_best, state, batch)
                    # Donates `state`: its buffers hold the new state, so it is never read again.
                    state, metrics = run.step(state, run.teacher, batch)
                    if step in config.profile_steps:
                        jax.block_until_ready(metrics)
                log.add(metrics)
                if step % config.log_every == 0:
                    report(step)  # waits for the step, in which a signal may come
                last, stopped = step == config.steps, stops.after(step)
                saves = last or stopped or step % config.save_every == 0
                if saves:
                    report(step)  # before held-out records are evaluated with a diverged state
                stopped = stopped or _evaluate((heldout, tasks), log, step, state, stops)
                if saves or stopped:
                    save(step, state, records.next_row)
                if stopped:
                    raise stops.error(f"{config.stage}: saved after step {step}, and stopped")
    warn_of_records(workdir)
    return state


@contextlib.contextmanager
def _saving(
    save: Callable[[int, State, int], None] | None, done: tuple[int, State, int], stops: Stops
) -> Iterator[None]:
    """Saves before an error of records or workers, or a signal, ends the wait for rows.

    Not with several processes, of which the others wait for this one's rows.

    Raises:
      StoppedError: after a signal.
    """
    try:
        yield
    except (UserError, Waiting) as error:
        if save is not None and jax.process_count() == 1:
            save(*done)
        if isinstance(error, Waiting):
            raise stops.error(f"stopped after step {done[0]}, while waiting for records") from None
        raise


def _evaluate(
    evaluations: Sequence[Heldout | Tasks | None],
    log: MetricsLog,
    step: int,
    state: State,
    stops: Stops,
) -> bool:
    """Makes the evaluations that are due and not made yet.

    Returns:
      Whether a signal has ended one; then the run makes it when it resumes.
    """
    for evaluation in evaluations:
        if evaluation is None or not evaluation.is_due(step) or log.has(evaluation.prefix, step):
            continue
        values = evaluation(state, stops)
        if values is None:
            return True
        log.write_evaluation(step, values)
    return False


def _open_log(config: TrainConfig, run: Run, mesh: Mesh, workdir: Path, start: int) -> MetricsLog:
    peak = peak_flops(list(mesh.devices.flat))
    skipped = config.max_skipped if config.on_divergence == "skip" else 0
    return MetricsLog(workdir, start, config.steps, config.stage, run.flops, peak, skipped)


def _keep(config: TrainConfig, log: MetricsLog) -> checkpoint.Keep:
    """Returns which checkpoints remain."""
    name = f"{HELDOUT}{config.keep_best}"
    scores = {row["step"]: row[name] for row in log.evaluated if name in row}
    return checkpoint.Keep(config.keep_last, config.keep_every, scores)


@contextlib.contextmanager
def _profiled(step: int, start: int, config: TrainConfig, workdir: Path) -> Iterator[None]:
    """Traces the step if it is one of `profile_steps` after `start`.

    The trace is written to `profile/` of the workdir, for TensorBoard or Perfetto.
    """
    first, last = config.profile_steps or (0, 0)
    if step == max(first, start + 1) and step <= last:
        jax.profiler.start_trace(workdir / "profile")
    yield
    if step == last:
        jax.profiler.stop_trace()


def _last_good(checkpoints: checkpoint.Checkpoints) -> str:
    latest = checkpoints.latest
    return "none yet" if latest is None else str(checkpoints.directory / str(latest))
