"""A page to talk with models about images, and to see their experts on them.

    python -m moddistill.explore --model DIR [--teacher DIR] [--compare DIR]

All models answer each question. Tokens show their probabilities, and patches of the images and
words the experts that computed them, layer by layer. Needs pip install 'moddistill[explore]'.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from moddistill.cli.generation_flags import (
    add_generation_flags,
    check_images,
    decoding_of,
    load_model,
)
from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.errors import UserError
from moddistill.explorer.address import listen
from moddistill.explorer.conversation import compile_ahead
from moddistill.explorer.models import ExploredModel

_TOP_LOGPROBS = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.explore`."""
    parser = Parser(__doc__, prog="python -m moddistill.explore")
    add_generation_flags(parser, max_new_tokens=256)
    parser.add_argument("--teacher", help="model whose answers are shown too")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        help="another student, whose experts are compared; repeat for several",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument(
        "--port", type=in_range(int, ge=0, le=65_535), default=7860, help="0 for any free one"
    )
    parser.add_argument("--password", default="", help="asked for by the page")
    args = parser.parse_args(argv)
    check_images(parser, args)
    with user_errors():
        explore(args)


def explore(args: argparse.Namespace) -> None:
    """Loads the models and serves the page until the process is interrupted."""
    with listen(args.host, args.port, args.password) as listening:
        if importlib.util.find_spec("gradio") is None:
            raise UserError(
                "explore: expected gradio (pip install 'moddistill[explore]'), got none"
            )
        models, decoding = _load(args), decoding_of(args, _TOP_LOGPROBS)
        # Gradio is an extra, and takes seconds to import.
        from moddistill.explorer.page import build_page  # noqa: PLC0415
        from moddistill.explorer.server import page_server  # noqa: PLC0415

        compile_ahead(models, decoding)
        server = page_server(build_page(models, decoding, args.image), args.password)
        host, port = listening.getsockname()[:2]
        print(f"explore: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server.run(sockets=[listening])


def _load(args: argparse.Namespace) -> list[ExploredModel]:
    named = [("student", args.model), *(("compared", name) for name in args.compare)]
    named += [("teacher", args.teacher)] if args.teacher else []
    models = []
    for role, name in named:
        model, params, tokenizer = load_model(args, name)
        parts = [part for part in Path(name).parts[-2:] if part != "model"]
        models.append(
            ExploredModel(
                title=f"{role}: {'/'.join(parts)}",
                model=model,
                params=params,
                tokenizer=tokenizer,
            )
        )
    return models


if __name__ == "__main__":
    main()
