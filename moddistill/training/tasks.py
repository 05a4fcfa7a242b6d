"""Evaluation tasks during training: the student answers questions between two steps."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moddistill.config import TrainConfig
from moddistill.data.tokenizer import Tokenizer
from moddistill.distributed.processes import is_main_process
from moddistill.errors import at_field
from moddistill.evals.answer_log import AnswerLog
from moddistill.evals.harness import check_tasks, evaluate_in_memory
from moddistill.evals.results import write_results
from moddistill.evals.runner import answer_and_score, find_task
from moddistill.evals.task import Question
from moddistill.models.vlm import Vlm
from moddistill.params import merge
from moddistill.training.interruption import Stops, Waiting
from moddistill.training.metrics import TASKS
from moddistill.training.state import State

LOG = logging.getLogger("moddistill")

Questions = Mapping[str, Sequence[Question]]


def read_questions(config: TrainConfig) -> Questions:
    """Returns the questions of each task; none of a task of lmms-eval, which reads its own.

    Raises:
      UserError: there is no such task, or its questions cannot be read.
    """
    found: dict[str, Sequence[Question]] = {}
    for name, task in config.tasks.items():
        origin = f"config.tasks.{name}"
        if task.data:
            source = find_task(task.task, f"{origin}.task")
            with at_field(f"{origin}.data"):
                found[name] = source.questions(Path(task.data))[: task.limit or None]
        else:
            check_tasks([task.task], origin=f"{origin}.task")
            found[name] = ()
    return found


class Tasks:
    """Tasks of a run: `tasks(state, stops)` returns their scores, as `eval_TASK_SCORE`.

    Answers and scores of a step are in `evaluations/STEP/TASK` of the workdir.
    """

    prefix = TASKS

    def __init__(
        self,
        config: TrainConfig,
        questions: Questions,
        model: Vlm,
        tokenizer: Tokenizer,
        workdir: Path,
    ):
        self._config, self._questions, self._workdir = config, questions, workdir
        self._model = model.clone(compute=model.compute.without_gradients())
        self._tokenizer = tokenizer

    def is_due(self, step: int) -> bool:
        """Returns whether the questions are answered after a step."""
        every = self._config.eval_every
        return step == self._config.steps or (every > 0 and step % every == 0)

    def __call__(self, state: State, stops: Stops) -> dict[str, float] | None:
        """Returns the scores; None if a signal comes before the last answer."""
        params = merge(state.params, state.frozen)
        found: dict[str, float] = {}
        for name in self._config.tasks:
            out = self._workdir / "evaluations" / str(int(state.step)) / name
            try:
                scores = self._scores(name, params, out, stops)
            except Waiting:
                return None
            found |= {
                f"{TASKS}{name}_{score}": value
                for score, value in scores.items()
                if isinstance(value, int | float)
            }
        LOG.info("tasks: %s", ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        return found

    def _scores(
        self, name: str, params: dict[str, Any], out: Path, stops: Stops
    ) -> Mapping[str, Any]:
        task, loaded = self._config.tasks[name], (self._model, params, self._tokenizer)
        if not task.data:
            limit = task.limit
            found = evaluate_in_memory(*loaded, task.task, out, limit=limit, on_answer=stops.check)
            return found[task.task]
        rows, scores = answer_and_score(
            *loaded, find_task(task.task), self._questions[name], AnswerLog(None, ""), stops.check
        )
        if is_main_process():
            write_results(out, rows, scores)
        return scores
