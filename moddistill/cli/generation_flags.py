"""Flags of the commands that write answers, and the loading of their model."""

import argparse
from pathlib import Path

from moddistill.cli.model_flags import add_model_flags
from moddistill.cli.parser import in_range
from moddistill.distributed.sharding import make_mesh
from moddistill.inference.answer import Decoding
from moddistill.inference.loading import Loaded, load_with_tokenizer
from moddistill.inference.sampling import Sampling


def add_generation_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Adds the flags of the model and of `Decoding`; a value out of range is a `UserError`."""
    add_model_flags(parser)
    parser.add_argument("--image", action="append", default=[], help="file; repeat for several")
    parser.add_argument(
        "--max_new_tokens",
        type=in_range(int, ge=1, le=10**6),
        default=max_new_tokens,
        help="longest answer",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="tokens sampled from; 0 for all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="probability of the tokens sampled from"
    )
    parser.add_argument(
        "--min_p", type=float, default=0.0, help="smallest probability, as share of the largest"
    )
    parser.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="1 for none; 1.1 is usual"
    )
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends an answer; repeat for several"
    )
    parser.add_argument("--seed", type=in_range(int, ge=0, lt=2**32), default=0, help="of sampling")


def decoding_of(args: argparse.Namespace, top_logprobs: int = 0) -> Decoding:
    """Returns the settings in the flags."""
    names = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
    return Decoding(
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(**{name: getattr(args, name) for name in names}),
        stop=tuple(args.stop),
        top_logprobs=top_logprobs,
        seed=args.seed,
    )


def load_model(args: argparse.Namespace, model: str = "") -> Loaded:
    """Loads `--model`, or another one, with the dtype and the mesh of the flags."""
    return load_with_tokenizer(model or args.model, args.dtype, args.mesh and make_mesh(args.mesh))


def check_images(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command if an `--image` is no file, before the model is loaded."""
    for path in args.image:
        if not Path(path).is_file():
            parser.error(f"--image: expected an image file, got {path!r}: no such file")
