"""Measures a model on a benchmark.

    python -m moddistill.evaluate --model DIR --benchmark easy_vqa --data DIR --out DIR

Writes `predictions.jsonl` (question, image, answer, prediction) and `scores.json` into `--out`. A
benchmark is a module of `moddistill.evals` with `questions(data)` and `score(rows)`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from moddistill.cli import plain_errors
from moddistill.evals.runner import evaluate


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.evaluate`."""
    parser = argparse.ArgumentParser(prog="python -m moddistill.evaluate", description=__doc__)
    parser.add_argument(
        "--model", required=True, help="model folder, or Hugging Face folder or name"
    )
    parser.add_argument("--benchmark", required=True, help="a module of moddistill.evals")
    parser.add_argument("--data", required=True, type=Path, help="its questions and images")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    with plain_errors():
        scores = evaluate(args.model, args.benchmark, args.data, args.out)
        print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
