"""A conversation in the terminal.

    python -m moddistill.chat --model DIR [--image FILE]

Images belong to the first question. An empty line or the end of input ends the conversation.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from moddistill.cli.model_flags import add_model_flags
from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.convert.resolve import as_model_folder, load
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.distributed.sharding import make_mesh
from moddistill.errors import printable
from moddistill.inference.decode import answer
from moddistill.inference.prompts import Prompt
from moddistill.models.vlm import Vlm


def converse(
    model: Vlm,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    questions: Iterator[str],
    images: Sequence[str],
    max_new_tokens: int,
) -> Iterator[str]:
    """Yields the answer to each question, given all earlier turns."""
    history: list[tuple[str, str]] = []
    for number, question in enumerate(questions):
        if number == 0 and IMAGE not in question:
            question = f"{IMAGE}\n" * len(images) + question
        prompt = Prompt(question, tuple(images), tuple(history))
        [reply] = answer(model, params, tokenizer, [prompt], max_new_tokens=max_new_tokens)
        history.append((question, reply.text))
        yield reply.text


def _input_lines() -> Iterator[str]:
    """Yields lines from the terminal up to an empty one."""
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.chat`."""
    parser = Parser(__doc__, prog="python -m moddistill.chat")
    add_model_flags(parser)
    parser.add_argument("--image", action="append", default=[], help="file; repeat for several")
    parser.add_argument(
        "--max_new_tokens", type=in_range(int, ge=1, le=10**6), default=256, help="longest answer"
    )
    args = parser.parse_args(argv)
    for path in args.image:
        if not Path(path).is_file():
            parser.error(f"--image: expected an image file, got {path!r}: no such file")
    with user_errors():
        folder = as_model_folder(args.model)
        mesh = args.mesh and make_mesh(args.mesh)
        model, params = load(folder, dtype=jnp.dtype(args.dtype), mesh=mesh)
        tokenizer = load_tokenizer(str(folder))
        for reply in converse(
            model, params, tokenizer, _input_lines(), args.image, args.max_new_tokens
        ):
            print(printable(reply))


if __name__ == "__main__":
    main()
