"""Tasks of lmms-eval, run by lmms-eval in this process, and their results in our form."""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moddistill.config import MeshConfig
from moddistill.convert.resolve import as_model_folder
from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed.processes import is_main_process
from moddistill.errors import UserError, did_you_mean, one_line
from moddistill.evals import tasks as own_tasks
from moddistill.evals.results import (
    ANSWERS,
    SCORES,
    check_results_folder,
    check_same_model,
    is_evaluated,
    read_scores,
)
from moddistill.evals.samples import write_samples
from moddistill.evals.tasks._task_utils.errors import TaskError
from moddistill.models.vlm import Vlm
from moddistill.storage import digests
from moddistill.storage.json_file import write_json

Scores = dict[str, dict[str, Any]]


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    out: Path,
    arguments: Mapping[str, str],
    include: str = "",
    limit: int = 0,
) -> Scores:
    """Evaluates a model on tasks of lmms-eval, and writes `scores.json` and `samples/TASK.jsonl`.

    See `run_tasks`, of which this is the strict form.

    Raises:
      UserError: lmms-eval is not installed, there is no such task (before any task runs), or tasks
        failed (after the others have run).
    """
    check_results_folder(out)
    check_tasks(tasks, include)
    failures = run_tasks(model, tasks, out, arguments, include, limit)
    if failures:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in failures.items())
        raise UserError(f"--tasks: {reasons}")
    return read_scores(out)


def model_arguments(dtype: str, mesh: MeshConfig) -> dict[str, str]:
    """Returns the arguments of a model in lmms-eval, besides its name."""
    sizes = dataclasses.asdict(mesh).items()
    return {"dtype": dtype, "mesh": ":".join(f"{axis}={size}" for axis, size in sizes)}


def check_tasks(tasks: Sequence[str], include: str = "", origin: str = "--tasks") -> None:
    """Raises UserError, naming the setting `origin`, without lmms-eval or for a task it lacks."""
    manager = _task_manager(include, origin)
    for task in tasks:
        if task not in manager.all_tasks:
            raise UserError(f"{origin}: {_unknown(task, manager)}")


def run_tasks(
    model: str,
    tasks: Sequence[str],
    out: Path,
    arguments: Mapping[str, str],
    include: str = "",
    limit: int = 0,
) -> dict[str, str]:
    """Evaluates a model on those tasks that have no scores yet, and returns why others have none.

    The model is loaded once. Each task is written when it is finished, and greedy answers are saved
    in `answers.jsonl` as they are made, so that the same call goes on where it ended. A task that
    fails does not stop the others; its traceback is printed. A task that lacks verdicts runs again
    if there is a judge; its greedy answers are not made again.

    Args:
      arguments: of the model in lmms-eval, besides its name.
      include: folder with tasks of one's own.
      limit: questions of a task that are asked, the first ones; 0: all.

    Raises:
      UserError: lmms-eval is not installed, or the folder has results of another model.
    """
    check_results_folder(out)
    manager = _task_manager(include)
    settings = {"model": model, "arguments": dict(arguments), "limit": limit}
    check_same_model(out, settings | _digest(model))
    scores = read_scores(out) if is_evaluated(out) else {}
    failures = {task: _unknown(task, manager) for task in tasks if task not in manager.all_tasks}
    missing = [task for task in tasks if task not in failures and not _is_finished(task, scores)]
    if not missing:
        return failures
    loaded = _load({"model": model, "answers": str(out / ANSWERS)} | dict(arguments))
    for task in missing:
        try:
            results = _evaluate(loaded, task, manager, out, limit)
            scores |= scores_of(results["results"])
            if load := loaded.expert_load():
                scores.setdefault(task, {})["expert_load"] = load
            write_json(out / SCORES, scores)
            write_samples(out, results, loaded.task_dict)
        except Exception as error:  # of a task, whose code and data are not ours
            failures[task] = _reason(error)
    return failures


def _is_finished(task: str, scores: Scores) -> bool:
    """Whether a task has scores, and lacks no verdict that a judge can be asked for."""
    if task not in scores or not os.environ.get("JUDGE_BASE_URL"):
        return task in scores
    counts = [n for name, n in scores[task].items() if name.endswith("_missing_verdicts")]
    return not any(counts)


def evaluate_in_memory(
    model: Vlm,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    task: str,
    out: Path,
    *,
    limit: int = 0,
    on_answer: Callable[[], None] = lambda: None,
) -> Scores:
    """Evaluates a model that is loaded on one task; writes as `evaluate_tasks`, but no answers.

    Args:
      limit: questions that are asked, the first ones; 0: all.
      on_answer: called after each answer; an error of it ends the evaluation.

    Raises:
      UserError: lmms-eval is not installed, or the data set of the task is not there.
    """
    manager = _task_manager("")  # before the import, which needs lmms-eval too
    from moddistill.evals.lmms import Chat  # noqa: PLC0415  needs lmms-eval

    loaded = Chat.of(model, params, tokenizer, on_answer)
    try:
        results = _evaluate(loaded, task, manager, out, limit)
    except Exception as error:
        if reason := _known_reason(error):
            raise UserError(f"{task}: {reason}") from error
        raise
    scores = scores_of(results["results"])
    if is_main_process():
        write_json(out / SCORES, scores)
        write_samples(out, results, loaded.task_dict)
    return scores


def _reason(error: Exception) -> str:
    """Words an error of a task; prints the traceback of one that is not about its data."""
    if reason := _known_reason(error):
        return reason
    traceback.print_exception(error)
    return f"expected a task that runs, got {type(error).__name__}: {one_line(str(error))}"


def _known_reason(error: BaseException) -> str:
    """Words an error about settings or data; empty for another one."""
    for cause in _causes(error):
        if isinstance(cause, UserError | TaskError):
            return str(cause)
        if isinstance(cause, ConnectionError | FileNotFoundError):  # of `datasets`
            return (
                "expected its data set in $HF_HOME, or a network to download it, got an error: "
                + one_line(str(cause))
            )
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, that from which it was raised, and so on.

    lmms-eval loads a data set several times, and then raises an error that has the last one.
    """
    while error is not None:
        yield error
        last = getattr(error, "last_attempt", None)
        error = last.exception() if last is not None else error.__cause__


def _task_manager(include: str, origin: str = "tasks") -> Any:
    expected = "lmms-eval, which pip install 'moddistill[eval]' installs"
    if importlib.util.find_spec("lmms_eval") is None:
        raise UserError(f"{origin}: expected {expected}")
    try:
        # The models first: this imports our plug-in by its entry point, which fails while something
        # else is importing it.
        importlib.import_module("lmms_eval.models")
        importlib.import_module("lmms_eval.tasks")  # takes seconds
    except ModuleNotFoundError as error:
        raise UserError(f"{origin}: expected {expected} whole, got no {error.name!r}") from error
    return _known_tasks(include)


@functools.cache  # it reads every task's file, which takes seconds
def _known_tasks(include: str) -> Any:
    from lmms_eval.tasks import TaskManager  # noqa: PLC0415  needs lmms-eval

    return TaskManager(include_path=[str(own_tasks.FOLDER), *filter(None, [include])])


def _unknown(task: str, manager: Any) -> str:
    known = did_you_mean(task, manager.all_tasks)
    return f"expected a task of lmms-eval, got {task!r}{known}"


def _digest(model: str) -> dict[str, str]:
    """The digest of a model folder, whose weights may be others when the same folder is evaluated
    again; that of a Hugging Face folder is of its import.
    """
    folder = as_model_folder(model)
    return {"digest": digests.fingerprint(folder)} if (folder / digests.NAME).is_file() else {}


def _load(arguments: Mapping[str, str]) -> Any:
    """The model as lmms-eval has it (`lmms.Chat`)."""
    from lmms_eval.models import get_model  # noqa: PLC0415  takes seconds

    return get_model("moddistill")(**arguments)


def _evaluate(loaded: Any, task: str, manager: Any, out: Path, limit: int) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate  # noqa: PLC0415

    return simple_evaluate(
        model=loaded,
        tasks=[task],
        task_manager=manager,
        limit=limit or None,
        log_samples=True,
        # Standard errors of means are exact; those of other scores come from `evals.bootstrap`.
        bootstrap_iters=0,
        # Where tasks write files for a server: `submissions/`.
        cli_args=argparse.Namespace(output_path=str(out), process_with_media=False),
    )


def scores_of(results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """Returns `{task: {metric: score}}` of the results of lmms-eval, with standard errors.

    It names metrics `METRIC,FILTER`, and their standard errors `METRIC_stderr,FILTER`.
    """
    found = {}
    for task, values in results.items():
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and "," in k}
        plain = all(name.endswith(",none") for name in numbers)
        found[task] = {k.removesuffix(",none") if plain else k: v for k, v in numbers.items()}
    return found
