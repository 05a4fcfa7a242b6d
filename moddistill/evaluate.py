"""Evaluates a model on a task.

    python -m moddistill.evaluate --model DIR --task easy_vqa --data DIR --out DIR

Writes `predictions.jsonl` (id, question, images, answers, prediction) and `scores.json` to `--out`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from moddistill.cli.parser import Parser, user_errors
from moddistill.evals.runner import TASKS, TaskRun, evaluate, find_task


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.evaluate`."""
    parser = Parser(__doc__, prog="python -m moddistill.evaluate")
    parser.add_argument(
        "--model", required=True, help="model folder, or Hugging Face folder or name"
    )
    parser.add_argument(
        "--task",
        required=True,
        help=f"{', '.join(TASKS)}, or a module that defines TASK, such as my_project.chartqa",
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of questions and images")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    with user_errors():
        task = find_task(args.task, "--task")
        [scores] = evaluate(args.model, [TaskRun(task, args.data, args.out)])
        print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
