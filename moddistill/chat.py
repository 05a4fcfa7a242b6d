"""A conversation in the terminal.

    python -m moddistill.chat --model DIR [--image FILE]

Pictures belong to the first question. An empty line or the end of input ends the conversation.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.convert.resolve import as_model_folder, load
from moddistill.data.records import IMAGE
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
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
    """The answer to each question, which sees all turns before it."""
    history: list[tuple[str, str]] = []
    for number, question in enumerate(questions):
        if number == 0 and IMAGE not in question:
            question = f"{IMAGE}\n" * len(images) + question
        prompt = Prompt(question, tuple(images), tuple(history))
        [reply] = answer(model, params, tokenizer, [prompt], max_new_tokens=max_new_tokens)
        history.append((question, reply.text))
        yield reply.text


def _typed() -> Iterator[str]:
    """Lines from the terminal up to an empty one."""
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
    parser.add_argument(
        "--model", required=True, help="model folder, or Hugging Face folder or name"
    )
    parser.add_argument("--image", action="append", default=[], help="file; repeat for several")
    parser.add_argument(
        "--max_new_tokens", type=in_range(int, ge=1), default=256, help="longest answer"
    )
    args = parser.parse_args(argv)
    for path in args.image:
        if not Path(path).is_file():
            parser.error(f"--image {path!r}: no such file")
    with user_errors():
        folder = as_model_folder(args.model)
        model, params = load(folder)
        tokenizer = load_tokenizer(str(folder))
        for reply in converse(model, params, tokenizer, _typed(), args.image, args.max_new_tokens):
            print(reply)


if __name__ == "__main__":
    main()
