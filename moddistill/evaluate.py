"""Evaluates a model on a task.

    python -m moddistill.evaluate --model DIR --task easy_vqa --data DIR --out DIR

Writes `predictions.jsonl` (id, question, images, answers, prediction) and `scores.json` to `--out`.
Questions are spread over all devices, each with a copy of the model unless `--mesh` shards it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from moddistill.cli import add_model_flags, plain_errors
from moddistill.config import MeshConfig
from moddistill.distributed.sharding import make_mesh
from moddistill.evals.runner import TASKS, TaskRun, evaluate, find_task


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.evaluate`."""
    parser = argparse.ArgumentParser(prog="python -m moddistill.evaluate", description=__doc__)
    add_model_flags(parser)
    parser.set_defaults(mesh=MeshConfig())
    parser.add_argument(
        "--task",
        required=True,
        help=f"{', '.join(TASKS)}, or a module that defines TASK, such as my_project.chartqa",
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of questions and images")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    with plain_errors():
        task = find_task(args.task, "--task")
        mesh = make_mesh(args.mesh)
        run = TaskRun(task, args.data, args.out)
        [scores] = evaluate(args.model, [run], dtype=jnp.dtype(args.dtype), mesh=mesh)
        print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
