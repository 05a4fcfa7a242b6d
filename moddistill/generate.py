"""Answers one question.

python -m moddistill.generate --model DIR --image FILE --prompt TEXT [--json]
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from moddistill.cli.model_flags import add_model_flags
from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.convert.resolve import as_model_folder, load
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import load_tokenizer
from moddistill.distributed.sharding import make_mesh
from moddistill.errors import printable
from moddistill.inference.decode import Answer, answer
from moddistill.inference.prompts import Prompt
from moddistill.inference.sampling import Sampling


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.generate`."""
    parser = Parser(__doc__, prog="python -m moddistill.generate")
    add_model_flags(parser)
    parser.add_argument("--image", action="append", default=[], help="file; repeat for several")
    parser.add_argument(
        "--prompt", required=True, help=f"question; without {IMAGE}, images go first"
    )
    parser.add_argument("--json", action="store_true", help="print text, token_ids and prompt_ids")
    parser.add_argument(
        "--max_new_tokens", type=in_range(int, ge=1, le=10**6), default=128, help="longest answer"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="probability of the tokens sampled from"
    )
    parser.add_argument("--seed", type=in_range(int, ge=0, lt=2**32), default=0, help="of sampling")
    args = parser.parse_args(argv)
    for path in args.image:
        if not Path(path).is_file():
            parser.error(f"--image: expected an image file, got {path!r}: no such file")
    with user_errors():
        result = _answer_one(args)
    answer_json = json.dumps(dataclasses.asdict(result), ensure_ascii=False)
    print(printable(answer_json if args.json else result.text))


def _answer_one(args: argparse.Namespace) -> Answer:
    sampling = Sampling(temperature=args.temperature, top_p=args.top_p)
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
