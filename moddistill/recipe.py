"""Runs the stages of a recipe in order, evaluates their models and writes a report.

    python -m moddistill.recipe --config experiments/llava_mod.py --workdir runs/llava_mod

Each stage has its own folder in the workdir; finished ones are skipped, an interrupted one resumes.
The models of the evaluated stages answer the questions of all tasks. The results are a table,
`predictions/TASK.jsonl` and `report.html`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moddistill.cli.parser import Parser, add_process_flags, user_errors
from moddistill.config import RecipeConfig, TaskConfig, TrainConfig
from moddistill.configdict import check_values, from_config_dict
from moddistill.data.sources import check_source
from moddistill.distributed.processes import (
    broadcast_from_main,
    initialize,
    is_main_process,
    leaving_at_once,
)
from moddistill.distributed.sharding import make_mesh
from moddistill.errors import UserError, at_field, invalid
from moddistill.evals.harness import check_tasks, evaluate_tasks, model_arguments
from moddistill.evals.results import is_evaluated
from moddistill.evals.runner import TaskRun, evaluate, find_task
from moddistill.extraction.run import extract
from moddistill.reports.summary import evaluation_folder, write_recipe, write_summary
from moddistill.storage.model_folder import read_source
from moddistill.teachers.cache import CACHED
from moddistill.training.interruption import ctrl_c_ends_at_once
from moddistill.training.lock import locked
from moddistill.training.log_output import start_logging
from moddistill.training.loop import LOG, train
from moddistill.training.resume import is_finished
from moddistill.training.stages import is_cached
from moddistill.training.validation import check_settings


def run(config: RecipeConfig, workdir: Path) -> str:
    """Trains and evaluates the stages, then writes predictions and the report.

    Returns:
      The table of scores, in the first process and if a stage is evaluated; else an empty text.

    Raises:
      UserError: if order and stages name different things, records, images or questions of any
        stage are missing, a stage fails, or another recipe runs in the workdir.
    """
    check_recipe(config, workdir)
    with locked(workdir):
        if is_main_process():
            write_recipe(config, workdir)
        for name in config.order:
            with _at_stage(name):
                train(_cached(config, workdir, name), workdir / name)
            if name in config.evaluated:
                _evaluate(config, workdir, name)
        return write_summary(workdir) if is_main_process() else ""


def _cached(config: RecipeConfig, workdir: Path, name: str) -> TrainConfig:
    """Returns the config of a stage, with the cache of its teacher if it has one.

    The cache is made first, unless the stage is finished.
    """
    stage = config.stages[name]
    if name not in config.caches:
        return stage
    folder = workdir / "caches" / name
    if not (workdir / name / "model").exists():
        extract(stage, config.caches[name], folder)
    return dataclasses.replace(stage, teacher=f"{CACHED}{folder}")


@contextlib.contextmanager
def _at_stage(name: str) -> Iterator[None]:
    """Names the settings of a stage in errors as the recipe's command line does."""
    try:
        yield
    except UserError as error:
        text = str(error)
        if text.startswith("config."):
            raise UserError(f"config.stages.{name}.{text.removeprefix('config.')}") from error
        raise UserError(f"config.stages.{name}: {text}") from error


def at_workdir(values: Any, workdir: str) -> Any:
    """Nested config values with `{workdir}` in strings replaced."""
    if isinstance(values, Mapping):
        return {key: at_workdir(value, workdir) for key, value in values.items()}
    return values.replace("{workdir}", workdir) if isinstance(values, str) else values


def _evaluate(config: RecipeConfig, workdir: Path, stage: str) -> None:
    """Evaluates the model of a stage on the tasks that it has no scores of.

    It runs in the dtype and on the mesh of its training.
    """
    folders = {name: evaluation_folder(workdir, stage, name) for name in config.tasks}
    # Processes evaluate together, so that all must find the same scores missing.
    missing = {
        name: config.tasks[name]
        for name, folder in folders.items()
        if not broadcast_from_main(is_evaluated(folder))
    }
    model, settings = workdir / stage / "model", config.stages[stage]
    runs = {
        name: TaskRun(find_task(each.task), Path(each.data), folders[name], each.limit)
        for name, each in missing.items()
        if each.data
    }
    dtype, mesh = jnp.dtype(settings.dtype), make_mesh(settings.mesh)
    scores = evaluate(model, list(runs.values()), dtype=dtype, mesh=mesh) if runs else []
    for (name, run), found in zip(runs.items(), scores, strict=True):
        shown = [f"{x.title} {found[x.key]:{x.format}}" for x in run.task.columns]
        LOG.info("%s: %s: %s", stage, name, ", ".join(shown))
    arguments = model_arguments(settings.dtype, settings.mesh)
    for name, each in missing.items():
        if not each.data:  # of lmms-eval
            out, limit = folders[name], each.limit
            found = evaluate_tasks(str(model), [each.task], out, arguments, limit=limit)
            LOG.info("%s: %s: %s", stage, name, _numbers(found[each.task]))


def _numbers(scores: Mapping[str, Any]) -> str:
    numbers = {name: x for name, x in scores.items() if isinstance(x, int | float)}
    return ", ".join(f"{name} {x:.4g}" for name, x in numbers.items() if "_stderr" not in name)


def check_recipe(config: RecipeConfig, workdir: Path) -> None:
    """Raises UserError for mistakes that would stop a later stage, before the first one runs."""
    # A recipe runs for days; a mistake in its last stage is reported at once.
    for name, stage in config.stages.items():
        with _at_stage(name):
            check_settings(stage)
            if (workdir / name / "model").exists():
                _check_steps(stage, workdir / name)
            else:
                _check_sources(stage, workdir)
    if sorted(config.order) != sorted(config.stages):
        raise invalid("config.order", config.order, f"each of {tuple(config.stages)} once")
    if not set(config.evaluated) <= set(config.stages):
        raise invalid("config.evaluated", config.evaluated, f"stages of {config.order}")
    for name in config.caches:
        if name not in config.stages or not config.stages[name].teacher:
            expected = f"stages of {config.order} with a teacher"
            raise invalid("config.caches", tuple(config.caches), expected)
        if is_cached(config.stages[name]):
            expected = "a model, whose cache config.caches makes"
            raise invalid(f"config.stages.{name}.teacher", config.stages[name].teacher, expected)
        check_values(config.caches[name], f"config.caches.{name}")
    if config.evaluated and not config.tasks:
        raise invalid("config.evaluated", config.evaluated, "() without config.tasks")
    _check_tasks(config, workdir)


def _check_tasks(config: RecipeConfig, workdir: Path) -> None:
    """Reads the questions of tasks that are still to be answered."""
    for name, each in config.tasks.items():
        if not each.data:
            _check_harness(each, f"config.tasks.{name}")
            continue
        task = find_task(each.task, f"config.tasks.{name}.task")
        folders = [evaluation_folder(workdir, stage, name) for stage in config.evaluated]
        if not all(map(is_evaluated, folders)) and is_main_process():
            with at_field(f"config.tasks.{name}.data"):
                task.questions(Path(each.data))


def _check_harness(task: TaskConfig, origin: str) -> None:
    """Raises UserError unless lmms-eval has the task, which it runs in one process."""
    if jax.process_count() > 1:
        expected = (
            f"a folder, since tasks of lmms-eval run in one process, not {jax.process_count()}"
        )
        raise invalid(f"{origin}.data", task.data, expected)
    check_tasks([task.task], origin=f"{origin}.task")


def _check_sources(stage: TrainConfig, workdir: Path) -> None:
    """Checks all sources but those in the workdir, which an earlier stage may write."""
    sources = {f"sources.{name}": source for name, source in stage.data.sources.items()}
    if stage.heldout_steps:
        sources["heldout"] = stage.data.heldout
    for name, source in sources.items():
        paths = (Path(source.path), Path(source.images))
        if not any(path.resolve().is_relative_to(workdir.resolve()) for path in paths):
            with at_field(f"config.data.{name}"):
                check_source(source)


def _check_steps(stage: TrainConfig, folder: Path) -> None:
    """Raises UserError if a finished stage has other steps; later stages begin with its model."""
    made = read_source(folder / "model")
    if not is_finished(stage, made):
        name = "steps" if made.get("steps") or stage.steps else "epochs"
        raise invalid(
            f"config.{name}",
            getattr(stage, name),
            f"{made.get(name)}, the {name} of the finished model in {folder}, or another --workdir",
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.recipe`."""
    parser = Parser(__doc__, prog="python -m moddistill.recipe", config=RecipeConfig)
    parser.add_argument("--workdir", required=True, help="folder of the recipe")
    add_process_flags(parser)
    args = parser.parse_args(argv)
    with ctrl_c_ends_at_once(), leaving_at_once(), user_errors():
        initialize(args.coordinator, args.processes, args.process)
        start_logging()
        values = at_workdir(args.config.to_dict(), args.workdir)
        config, workdir = from_config_dict(RecipeConfig, values), Path(args.workdir)
        table = run(config, workdir)
        if is_main_process():
            print(table, end="\n" if table else "")
            print(f"report: {args.workdir}/report.html")


if __name__ == "__main__":
    main()
