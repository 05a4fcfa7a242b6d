"""Evaluation of a model on tasks: greedy answers, scores and expert load."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from moddistill.convert.resolve import as_model_folder
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed.processes import is_main_process
from moddistill.errors import UserError, did_you_mean
from moddistill.evals import easy_vqa
from moddistill.evals.answer_log import AnswerLog, given_of
from moddistill.evals.expert_load import LOAD_SAMPLES, expert_load
from moddistill.evals.results import (
    ANSWERS,
    check_results_folder,
    check_same_model,
    write_results,
)
from moddistill.evals.task import Question, Row, Task
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import generate
from moddistill.inference.loading import load_with_tokenizer
from moddistill.inference.prompts import Prompt
from moddistill.models.layers import DType
from moddistill.models.vlm import Vlm
from moddistill.storage.digests import fingerprint

TASKS = {"easy_vqa": easy_vqa.TASK}


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """A task, the folder of its data, the folder of its results, and a limit of its questions."""

    task: Task
    data: Path
    out: Path
    limit: int = 0

    def questions(self) -> list[Question]:
        """Returns the first `limit` questions; all of them if it is 0."""
        return self.task.questions(self.data)[: self.limit or None]


def find_task(name: str, origin: str = "task") -> Task:
    """Returns a task by its name in `TASKS`, or `TASK` of a module such as `my_project.chartqa`.

    Raises:
      UserError: naming the setting `origin`, if there is neither.
    """
    if name in TASKS:
        return TASKS[name]
    try:
        task = getattr(importlib.import_module(name), "TASK", None) if name else None
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists, and an import inside it failed
        task = None
    if not isinstance(task, Task):
        names = ", ".join(map(repr, TASKS))
        raise UserError(
            f"{origin}: expected {names} or a module that defines TASK, got {name!r}"
            + did_you_mean(name, TASKS)
        )
    return task


def evaluate(
    folder: str | Path,
    runs: Sequence[TaskRun],
    *,
    dtype: DType = jnp.float32,
    mesh: Mesh | None = None,
) -> list[dict[str, Any]]:
    """Evaluates a model on tasks and writes their results; the model is loaded once.

    Args:
      folder: a model folder, a Hugging Face folder or a hub name.
      runs: the tasks with their data and result folders.
      dtype: of parameters, computation and cache.
      mesh: devices to shard the parameters and the rows over; by default the first device. All
        processes call this; the first one writes.

    Returns:
      The scores of each run; those of a sparse model include `expert_load`.

    Raises:
      UserError: if data are missing, or a result folder is a model folder or has other results; or
        if questions cannot be answered, after all others, from which the same call goes on.
    """
    # Errors in folders and data come before the time that loading takes.
    for run in runs:
        check_results_folder(run.out)
    all_questions = [run.questions() for run in runs]
    folder = as_model_folder(folder)
    logs = [_log(run, fingerprint(folder), jnp.dtype(dtype).name) for run in runs]
    model, params, tokenizer = load_with_tokenizer(folder, dtype, mesh)
    all_scores = []
    for run, questions, log in zip(runs, all_questions, logs, strict=True):
        rows, scores = answer_and_score(model, params, tokenizer, run.task, questions, log)
        if model.config.decoder.moe is not None:
            prompts = [_prompt(question) for question in questions[:LOAD_SAMPLES]]
            scores["expert_load"] = expert_load(model, params, tokenizer, prompts)
        if is_main_process():
            write_results(run.out, rows, scores)
        all_scores.append(scores)
    return all_scores


def _log(run: TaskRun, digest: str, dtype: str) -> AnswerLog:
    """Records what is evaluated into the folder of a run; returns the answers that it has."""
    if is_main_process():
        settings = {"data": str(run.data), "limit": run.limit, "digest": digest, "dtype": dtype}
        check_same_model(run.out, settings)
    # Several processes may read different answers, but must ask the same questions.
    alone = jax.process_count() == 1
    return AnswerLog(run.out / ANSWERS if alone else None, f"{digest} {dtype}")


def answer_and_score(
    model: Vlm,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[Question],
    log: AnswerLog,
    on_answer: Callable[[], None] = lambda: None,
) -> tuple[list[Row], dict[str, Any]]:
    """Returns a row for each question with its greedy answer, and the scores of all rows.

    Args:
      log: answers that need not be made, and to which new ones are added.
      on_answer: called after each answer; an error of it ends the evaluation.

    Raises:
      UserError: questions cannot be answered, after all others.
    """
    decoding = Decoding(max_new_tokens=task.max_new_tokens)
    asked = [(question, _prompt(question)) for question in questions]
    keys = [log.key((each.id, each.images), prompt, decoding) for each, prompt in asked]
    texts = {number: given.text for number, key in enumerate(keys) if (given := log.get(key))}
    todo = [number for number in range(len(keys)) if number not in texts]
    prompts, failed = [asked[number][1] for number in todo], {}
    found = generate(model, params, tokenizer, prompts, decoding, failed.__setitem__)
    done, total = len(texts), len(keys)
    for place, answer in tqdm(
        found, initial=done, total=total, desc="answers", unit="answer", mininterval=1.0
    ):
        texts[todo[place]] = answer.text
        log.add(keys[todo[place]], given_of(answer))
        on_answer()
    if failed:
        first = min(failed)
        raise UserError(
            f"{len(failed)} of {total} questions cannot be answered, of which the first one is "
            f"{questions[todo[first]].id!r}: {failed[first]}"
        )
    rows = [_row(question, texts[number]) for number, question in enumerate(questions)]
    rows = [row | {"correct": task.is_correct(row)} for row in rows]
    scores: dict[str, Any] = task.score(rows)
    if absent := [column.key for column in task.columns if column.key not in scores]:
        raise UserError(f"task: expected scores for all columns, got none for {absent}")
    return rows, scores


def _prompt(question: Question) -> Prompt:
    return Prompt(question.prompt, question.images)


def _row(question: Question, text: str) -> Row:
    return {
        "id": question.id,
        "question": question.prompt.replace(IMAGE, "").strip(),
        "images": list(question.images),
        "answers": list(question.answers),
        "prediction": text,
    }
