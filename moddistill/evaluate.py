"""Evaluates a model on tasks: those of lmms-eval, or one of this library; or compares models.

    python -m moddistill.evaluate --model DIR --tasks mme,pope,gqa --out DIR
    python -m moddistill.evaluate --model DIR --task easy_vqa --data DIR --out DIR
    python -m moddistill.evaluate --suite llava-mod --compare MODEL MODEL ... --out DIR

With `--tasks`, lmms-eval (pip install 'moddistill[eval]') asks and scores; `--out` gets
`scores.json`, `samples/TASK.jsonl` and a cache, from which the same command goes on. With `--task`,
`--out` gets `scores.json` and `predictions.jsonl` (id, question, images, answers, prediction).
Questions are spread over all devices, each with a copy of the model unless `--mesh` shards it.

With `--suite`, each model is evaluated on the benchmarks of a paper, into a folder of its own below
`--out`; a model, or a folder of results, that has scores is not evaluated again. The scores with
bootstrap intervals are printed next to the published ones, and written to `comparison.json` and
`comparison.html`. What could not be evaluated is said there; without any score the exit code is 1.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from moddistill.cli.model_flags import add_model_flags
from moddistill.cli.parser import Parser, user_errors
from moddistill.config import MeshConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.errors import UserError
from moddistill.evals.harness import evaluate_tasks, model_arguments
from moddistill.evals.results import EVALUATION
from moddistill.evals.runner import TASKS, TaskRun, evaluate, find_task
from moddistill.evals.suite import compare, evaluate_models, read_suite
from moddistill.reports.comparison import comparison_table, write_comparison
from moddistill.storage.json_file import read_json, write_json


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.evaluate`."""
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.task is None) != (args.data is None):
        parser.error("--data: expected with --task, and only there")
    if (args.suite is None) != (args.compare is None):
        parser.error("--compare: expected with --suite, and only there")
    if (args.suite is None) == (args.model is None):
        parser.error("--model: expected with --task and --tasks, and only there")
    with user_errors():
        if args.suite:
            _compare(args)
        else:
            scores = _evaluate_one(args) if args.task else _evaluate_tasks(args)
            print(json.dumps(scores, indent=2))


def _parser() -> Parser:
    parser = Parser(__doc__, prog="python -m moddistill.evaluate")
    add_model_flags(parser, required=False)
    parser.set_defaults(mesh=MeshConfig())
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--tasks", metavar="NAME,...", help="tasks of lmms-eval")
    asked.add_argument(
        "--task",
        help=f"{', '.join(TASKS)}, or a module that defines TASK, such as my_project.chartqa",
    )
    asked.add_argument("--suite", metavar="NAME", help="benchmarks of a paper: llava-mod")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="MODEL",
        help="with --suite: models as --model takes, or folders of finished results",
    )
    parser.add_argument("--data", type=Path, help="with --task: folder of questions and images")
    parser.add_argument(
        "--include_path",
        default="",
        help="with --tasks and --suite: folder with tasks of your own",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    return parser


def _evaluate_one(args: argparse.Namespace) -> dict[str, Any]:
    task = find_task(args.task, "--task")
    run = TaskRun(task, args.data, args.out)
    mesh = make_mesh(args.mesh)
    [scores] = evaluate(args.model, [run], dtype=jnp.dtype(args.dtype), mesh=mesh)
    file = args.out / EVALUATION  # it has what `evaluate` compares when it is called again
    write_json(file, read_json(file) | {"model": args.model, "task": args.task})
    return scores


def _evaluate_tasks(args: argparse.Namespace) -> dict[str, Any]:
    names = args.tasks.split(",")
    arguments = model_arguments(args.dtype, args.mesh)
    return evaluate_tasks(args.model, names, args.out, arguments, args.include_path)


def _compare(args: argparse.Namespace) -> None:
    """Writes the comparison, and prints its table; an error if there is no score in it."""
    suite = read_suite(args.suite)
    folders, failures = evaluate_models(
        suite, args.compare, args.out, model_arguments(args.dtype, args.mesh), args.include_path
    )
    comparison = compare(suite, folders, failures)
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "comparison.json", comparison)
    write_comparison(args.out / "comparison.html", comparison)
    print(comparison_table(comparison))
    cells = [cell for row in comparison["rows"] for cell in row["scores"].values()]
    if not any("score" in cell for cell in cells):
        raise UserError("--compare: expected a model with a score, got none (see the notes)")


if __name__ == "__main__":
    main()
