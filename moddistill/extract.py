"""Extracts a teacher's predictions at the supervised tokens of a stage's records, once.

    python -m moddistill.extract --config experiments/d2s.py --out caches/d2s
    python -m moddistill.train --config experiments/d2s.py --config.teacher=cache:caches/d2s \\
        --workdir runs/d2s

Training from a cache has no teacher in memory. Of each token it has the most probable ids with
their log-probabilities and the probability of all others; of preference pairs the log-likelihoods
of both answers. The same command again continues an interrupted extraction, and checks a finished
one.
"""

from collections.abc import Sequence
from pathlib import Path

from moddistill.cli.parser import Parser, add_process_flags, in_range, user_errors
from moddistill.config import CacheConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.distributed.processes import initialize, leaving_at_once
from moddistill.extraction.run import BACKENDS, extract
from moddistill.training.interruption import ctrl_c_ends_at_once
from moddistill.training.log_output import start_logging

_MOST_IDS = 10**6


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.extract`."""
    parser = Parser(__doc__, prog="python -m moddistill.extract", config=TrainConfig)
    parser.add_argument("--out", required=True, type=Path, help="folder of the cache")
    number = in_range(int, ge=1, le=_MOST_IDS)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--top_k", type=number, metavar="K", help="the K most probable ids of each token (64)"
    )
    kinds.add_argument(
        "--samples",
        type=number,
        metavar="N",
        help="N ids drawn from the teacher's distribution, an unbiased estimate",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="jax",
        help="what runs the teacher; transformers, of the extra `torch`: any model that it has for "
        "images and text, with its own processor and chat template",
    )
    add_process_flags(parser)
    args = parser.parse_args(argv)
    cache = CacheConfig("top_k", args.top_k) if args.top_k else CacheConfig()
    cache = CacheConfig("samples", args.samples) if args.samples else cache
    with ctrl_c_ends_at_once(), leaving_at_once(), user_errors():
        initialize(args.coordinator, args.processes, args.process)
        start_logging()
        config = from_config_dict(TrainConfig, args.config.to_dict())
        extract(config, cache, args.out, args.backend)


if __name__ == "__main__":
    main()
