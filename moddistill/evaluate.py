"""Evaluates a model on tasks: those of lmms-eval, or one of this library.

    python -m moddistill.evaluate --model DIR --tasks mme,pope,gqa --out DIR
    python -m moddistill.evaluate --model DIR --task easy_vqa --data DIR --out DIR

With `--tasks`, lmms-eval (pip install 'moddistill[eval]') asks and scores; `--out` gets
`scores.json`, `samples/TASK.jsonl` and a cache, from which the same command goes on. With `--task`,
`--out` gets `scores.json` and `predictions.jsonl` (id, question, images, answers, prediction).
Questions are spread over all devices, each with a copy of the model unless `--mesh` shards it.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from moddistill.cli.model_flags import add_model_flags
from moddistill.cli.parser import Parser, user_errors
from moddistill.config import MeshConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.evals.harness import evaluate_tasks
from moddistill.evals.runner import TASKS, TaskRun, evaluate, find_task


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.evaluate`."""
    parser = Parser(__doc__, prog="python -m moddistill.evaluate")
    add_model_flags(parser)
    parser.set_defaults(mesh=MeshConfig())
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--tasks", metavar="NAME,...", help="tasks of lmms-eval")
    asked.add_argument(
        "--task",
        help=f"{', '.join(TASKS)}, or a module that defines TASK, such as my_project.chartqa",
    )
    parser.add_argument("--data", type=Path, help="with --task: folder of questions and images")
    parser.add_argument(
        "--include_path", default="", help="with --tasks: folder with tasks of your own"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    if (args.task is None) != (args.data is None):
        parser.error("--data: expected with --task, and only there")
    with user_errors():
        scores = _evaluate_one(args) if args.task else _evaluate_tasks(args)
        print(json.dumps(scores, indent=2))


def _evaluate_one(args: argparse.Namespace) -> dict[str, Any]:
    task = find_task(args.task, "--task")
    run = TaskRun(task, args.data, args.out)
    mesh = make_mesh(args.mesh)
    [scores] = evaluate(args.model, [run], dtype=jnp.dtype(args.dtype), mesh=mesh)
    return scores


def _evaluate_tasks(args: argparse.Namespace) -> dict[str, Any]:
    mesh = ":".join(f"{axis}={size}" for axis, size in dataclasses.asdict(args.mesh).items())
    arguments = {"dtype": args.dtype, "mesh": mesh}
    names = args.tasks.split(",")
    return evaluate_tasks(args.model, names, args.out, arguments, args.include_path)


if __name__ == "__main__":
    main()
