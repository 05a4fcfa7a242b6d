"""Decoding with an explicit key/value cache, and one answer from the command line.

    python -m moddistill.generate --model DIR --image FILE --prompt TEXT [--json]

Prompts of a batch may differ in length: each row has its own positions and sees its own tokens
alone, so with dropless experts an answer does not depend on the rows beside it.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.convert.resolve import as_model_folder, load
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import load_tokenizer
from moddistill.inference.decode import Answer, answer
from moddistill.inference.prompts import Prompt
from moddistill.inference.sampling import Sampling


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.generate`."""
    parser = Parser(__doc__, prog="python -m moddistill.generate")
    parser.add_argument(
        "--model", required=True, help="model folder, or Hugging Face folder or name"
    )
    parser.add_argument("--image", action="append", default=[], help="file; repeat for several")
    parser.add_argument(
        "--prompt", required=True, help=f"question; without {IMAGE}, images go first"
    )
    parser.add_argument("--json", action="store_true", help="print text, token_ids and prompt_ids")
    parser.add_argument(
        "--max_new_tokens", type=in_range(int, ge=1), default=128, help="longest answer"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help="probability that is sampled from")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    args = parser.parse_args(argv)
    for path in args.image:
        if not Path(path).is_file():
            parser.error(f"--image {path!r}: no such file")
    with user_errors():
        result = _answer_one(args)
    print(json.dumps(dataclasses.asdict(result), ensure_ascii=False) if args.json else result.text)


def _answer_one(args: argparse.Namespace) -> Answer:
    sampling = Sampling(args.temperature, args.top_p)
    folder = as_model_folder(args.model)
    model, params = load(folder)
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
