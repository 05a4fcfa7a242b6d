"""Answers one question, or those of a file.

    python -m moddistill.generate --model DIR --image FILE --prompt TEXT [--json]
    python -m moddistill.generate --model DIR --jsonl FILE --out FILE

Each line of the file is an object with `prompt` and, where there are any, `images` (files, relative
to the folder of the file), `id`, `system` and `history` (pairs of question and answer). Lines of
`--out` come in the order in which the answers finish. The same command again goes on where it was
interrupted.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from moddistill.cli.generation_flags import (
    add_generation_flags,
    check_images,
    decoding_of,
    load_model,
)
from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.convert.resolve import as_model_folder
from moddistill.errors import printable
from moddistill.inference.answer import Answer
from moddistill.inference.answer_file import answer_file
from moddistill.inference.generation import stream
from moddistill.inference.prompts import Prompt, with_images
from moddistill.storage.digests import fingerprint
from moddistill.storage.model_folder import read_model_config


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.generate`."""
    parser = Parser(__doc__, prog="python -m moddistill.generate")
    add_generation_flags(parser, max_new_tokens=128)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="question; without <image>, images go first")
    asked.add_argument("--jsonl", type=Path, help="file of questions")
    parser.add_argument("--out", type=Path, help="file of the answers to --jsonl")
    parser.add_argument("--json", action="store_true", help="print all fields of the answer")
    parser.add_argument(
        "--logprobs",
        type=in_range(int, ge=0, le=1000),
        default=0,
        help="most probable tokens to report for each token",
    )
    args = parser.parse_args(argv)
    check_images(parser, args)
    if (args.jsonl is None) != (args.out is None) or (args.jsonl and args.image):
        parser.error("--jsonl: expected --out with it, and no --image")
    if args.jsonl and args.out.resolve() == args.jsonl.resolve():
        parser.error(f"--out: expected another file than --jsonl, got {str(args.out)!r} for both")
    if args.json and args.jsonl:
        parser.error("--json: expected --prompt with it, got --jsonl, whose rows have all fields")
    if args.logprobs and not (args.json or args.jsonl):
        parser.error("--logprobs: expected --json or --jsonl with it, got neither")
    with user_errors():
        if args.jsonl:
            _answer_file(args)
        else:
            _answer_one(args)


def _answer_one(args: argparse.Namespace) -> None:
    """Prints the answer, its text as it is written."""
    decoding = decoding_of(args, args.logprobs)
    prompt = Prompt(with_images(args.prompt, len(args.image)), tuple(args.image))
    for part in stream(*load_model(args), prompt, decoding):
        if not isinstance(part, Answer):
            if not args.json:
                print(printable(part), end="", flush=True)
        elif args.json:
            print(printable(json.dumps(dataclasses.asdict(part), ensure_ascii=False)))
        else:
            print()


def _answer_file(args: argparse.Namespace) -> None:
    decoding = decoding_of(args, args.logprobs)
    folder = as_model_folder(args.model)
    read_model_config(folder)  # of a folder that is no model, it says what is missing
    model = {"model": args.model, "weights": fingerprint(folder), "dtype": args.dtype}
    failed = answer_file(lambda: load_model(args), args.jsonl, args.out, decoding, model)
    if failed:
        sys.exit(f"error: {args.out}: {failed} questions have an `error` in place of an answer")


if __name__ == "__main__":
    main()
