"""Answers one question.

python -m moddistill.generate --model DIR --image FILE --prompt TEXT [--json]
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from moddistill.cli import add_model_flags, plain_errors
from moddistill.convert.resolve import as_model_folder, load
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import load_tokenizer
from moddistill.distributed.sharding import make_mesh
from moddistill.inference.decode import Answer, answer
from moddistill.inference.prompts import Prompt
from moddistill.inference.sampling import Sampling


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.generate`."""
    parser = argparse.ArgumentParser(prog="python -m moddistill.generate", description=__doc__)
    add_model_flags(parser)
    parser.add_argument("--image", action="append", default=[], help="file; repeat for several")
    parser.add_argument(
        "--prompt", required=True, help=f"question; without {IMAGE}, images go first"
    )
    parser.add_argument("--json", action="store_true", help="print text, token_ids and prompt_ids")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="probability of the tokens sampled from"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        parser.error(f"--max_new_tokens: expected 1 or more, got {args.max_new_tokens}")
    for path in args.image:
        if not Path(path).is_file():
            parser.error(f"--image: expected an image file, got {path!r}: no such file")
    with plain_errors():
        result = _answer_one(args)
    print(json.dumps(dataclasses.asdict(result), ensure_ascii=False) if args.json else result.text)


def _answer_one(args: argparse.Namespace) -> Answer:
    sampling = Sampling(args.temperature, args.top_p)
    folder = as_model_folder(args.model)
    mesh = args.mesh and make_mesh(args.mesh)
    model, params = load(folder, dtype=jnp.dtype(args.dtype), mesh=mesh)
    question = args.prompt
    if IMAGE not in question:
        question = f"{IMAGE}\n" * len(args.image) + question
    [result] = answer(
        model,
        params,
        load_tokenizer(str(folder)),
        [Prompt(question, tuple(args.image))],
        max_new_tokens=args.max_new_tokens,
        sampling=sampling,
        seed=args.seed,
    )
    return result


if __name__ == "__main__":
    main()
