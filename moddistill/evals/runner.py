"""Evaluation of a model on tasks: greedy answers, scores and expert load."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from moddistill.convert.resolve import as_model_folder, load
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.distributed.processes import is_main_process
from moddistill.errors import UserError, did_you_mean
from moddistill.evals import easy_vqa
from moddistill.evals.expert_load import expert_load
from moddistill.evals.results import check_results_folder, write_results
from moddistill.evals.task import Question, Row, Task
from moddistill.inference.answer import Decoding
from moddistill.inference.generation import generate
from moddistill.inference.prompts import Prompt
from moddistill.models.layers import DType
from moddistill.models.vlm import Vlm

TASKS = {"easy_vqa": easy_vqa.TASK}
LOAD_SAMPLES = 512  # prompts that the expert load is measured on


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
      UserError: if data are missing, or a result folder is a model folder.
    """
    # Errors in folders and data come before the time that loading takes.
    for run in runs:
        check_results_folder(run.out)
    all_questions = [run.questions() for run in runs]
    folder = as_model_folder(folder)
    model, params = load(folder, dtype=dtype, mesh=mesh, stacked=False)
    tokenizer = load_tokenizer(str(folder))
    all_scores = []
    for run, questions in zip(runs, all_questions, strict=True):
        rows, scores = answer_and_score(model, params, tokenizer, run.task, questions)
        if model.config.decoder.moe is not None:
            prompts = [_prompt(question) for question in questions[:LOAD_SAMPLES]]
            scores["expert_load"] = expert_load(model, params, tokenizer, prompts)
        if is_main_process():
            write_results(run.out, rows, scores)
        all_scores.append(scores)
    return all_scores


def answer_and_score(
    model: Vlm,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    task: Task,
    questions: Sequence[Question],
    on_answer: Callable[[], None] = lambda: None,
) -> tuple[list[Row], dict[str, Any]]:
    """Returns a row for each question with its greedy answer, and the scores of all rows.

    Args:
      on_answer: called after each answer; an error of it ends the evaluation.
    """
    prompts = [_prompt(question) for question in questions]
    decoding = Decoding(max_new_tokens=task.max_new_tokens)
    found = generate(model, params, tokenizer, prompts, decoding)
    bar = tqdm(found, total=len(prompts), desc="answers", unit="answer", mininterval=1.0)
    texts = {}
    for number, answer in bar:
        texts[number] = answer.text
        on_answer()
    rows = [_row(question, texts[number]) for number, question in enumerate(questions)]
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
