"""Tasks of lmms-eval, run by lmms-eval in this process, and their results in our form."""

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moddistill.data.tokenizer import Tokenizer
from moddistill.errors import UserError, did_you_mean, one_line
from moddistill.evals import tasks as own_tasks
from moddistill.evals.results import SCORES, check_results_folder, write_jsonl
from moddistill.evals.tasks._task_utils.errors import TaskError
from moddistill.models.vlm import Vlm
from moddistill.storage.json_file import write_json

Scores = dict[str, dict[str, int | float]]


def evaluate_tasks(
    model: str, tasks: Sequence[str], out: Path, arguments: Mapping[str, str], include: str = ""
) -> Scores:
    """Evaluates a model on tasks of lmms-eval, and writes `scores.json` and `samples/TASK.jsonl`.

    Answers are kept in `cache/` as they are made, so that the same call goes on where it ended.

    Args:
      arguments: of the model in lmms-eval, besides its name.
      include: folder with tasks of one's own, besides those in `evals/tasks`.

    Raises:
      UserError: lmms-eval is not installed, there is no such task, or its data set is not there.
    """
    check_results_folder(out)
    settings = {"model": model} | dict(arguments)
    text = ",".join(f"{name}={value}" for name, value in settings.items())
    cache = str(out / "cache")
    results = _run("moddistill", tasks, out, include, model_args=text, use_cache=cache)
    return _write(results, out)


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
    """As `evaluate_tasks` for one task and a model that is loaded; nothing is kept in a cache.

    Args:
      limit: questions that are asked, the first ones; 0: all.
      on_answer: called after each answer; an error of it ends the evaluation.
    """
    check_tasks([task])
    from moddistill.evals.lmms import Chat  # noqa: PLC0415  needs lmms-eval

    chat = Chat.of(model, params, tokenizer, on_answer)
    return _write(_run(chat, [task], out, limit=limit or None), out)


def check_tasks(tasks: Sequence[str], include: str = "", origin: str = "--tasks") -> Any:
    """Returns lmms-eval's manager of tasks.

    Raises:
      UserError: naming the setting `origin`; lmms-eval is not installed, or has no such task.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        raise UserError(
            f"{origin}: expected lmms-eval, which pip install 'moddistill[eval]' installs"
        )
    from lmms_eval.tasks import TaskManager  # noqa: PLC0415  takes seconds

    manager = TaskManager(include_path=[str(own_tasks.FOLDER), *filter(None, [include])])
    for task in tasks:
        if task not in manager.all_tasks:
            known = did_you_mean(task, manager.all_tasks)
            raise UserError(f"{origin}: expected tasks of lmms-eval, got {task!r}{known}")
    return manager


def _run(
    model: Any, tasks: Sequence[str], out: Path, include: str = "", **settings: Any
) -> dict[str, Any]:
    """Returns the results of lmms-eval, of a model by its name there or in memory.

    Tasks write files for a judge or a server to `submissions/` in `out`.
    """
    manager = check_tasks(tasks, include)
    from lmms_eval.evaluator import simple_evaluate  # noqa: PLC0415  takes seconds

    try:
        return simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            log_samples=True,
            cli_args=argparse.Namespace(output_path=str(out), process_with_media=False),
            **settings,
        )
    except Exception as error:
        if message := data_error(error, tasks):
            raise UserError(message) from error
        raise


def _write(results: Mapping[str, Any], out: Path) -> Scores:
    scores = scores_of(results["results"])
    for task, samples in results["samples"].items():
        (out / "samples").mkdir(parents=True, exist_ok=True)
        write_jsonl(out / "samples" / f"{task}.jsonl", [_sample(each) for each in samples])
    write_json(out / SCORES, scores)
    return scores


def data_error(error: BaseException, tasks: Sequence[str]) -> str:
    """Returns what to do about something that a task needs, or nothing for another error.

    lmms-eval loads a data set several times, and then raises an error that has the last one.
    """
    cause = getattr(error, "last_attempt", None)
    error = cause.exception() if cause else error
    if isinstance(error, TaskError):
        return f"--tasks: {error}"
    if not isinstance(error, ConnectionError | FileNotFoundError):
        return ""
    return (
        f"--tasks: expected the data sets of {', '.join(tasks)} in $HF_HOME, or a network to "
        f"download them, got an error: {one_line(str(error))}"
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


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The number of a document, what was asked and answered, and what is right."""
    answers = sample["filtered_resps"]
    prediction = answers[0] if len(answers) == 1 else list(answers)
    return {"id": sample["doc_id"], "answers": sample.get("target"), "prediction": prediction}
