"""Compiles the real step of an experiment for a named accelerator, without owning one.

    python -m moddistill.plan --config experiments/d2s.py:student=qwen2-0.5b,teacher=qwen2-7b \\
        --topology v6e:1x1 --config.batch_size=8 [--json] [--fit]
    python -m moddistill.plan --answer MODEL --chip v5e h100      (its flags: --answer MODEL --help)

Topologies are TPUs with the extra `tpu` installed, GPUs with `cuda12`, and simulated devices of
this machine; moddistill/distributed/accelerators.py lists them. Prints memory per chip by kind,
model FLOPs per step, collectives, whether the step fits, and the days that the experiment takes.
Models need not exist: a path that does not exist is planned as the preset that it names.
"""

import argparse
import json
import sys
import typing
from collections.abc import Sequence

import jax

from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.config import Dtype, ExpertConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.distributed.accelerators import CHIPS
from moddistill.models.upcycle import upcycle_config
from moddistill.planning.answers import format_answer, plan_answer
from moddistill.planning.planner import architecture, fit, format_report, plan
from moddistill.planning.roofline import answer_size

_ANSWER = """Plans the answers of a model on one chip, which need not be there.

    python -m moddistill.plan --answer MODEL --chip v5e h100 [--num_experts 4] [--json]

Prints the bytes of parameters, cache and temporary arrays, FLOPs of prompt and token, and bounds:
no program is faster than the FLOPs and the bytes that it reads allow at the chip's peak and the
bandwidth of its memory. MODEL need not exist, as random:PRESET or a path that names a preset.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.plan`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    jax.config.update("jax_platforms", "cpu")
    is_answer = any(arg.partition("=")[0] == "--answer" for arg in argv)
    (_plan_answer if is_answer else _plan_step)(argv)


def _plan_step(argv: list[str]) -> None:
    parser = Parser(__doc__, prog="python -m moddistill.plan", config=TrainConfig)
    parser.add_argument(
        "--topology", required=True, help="accelerators, such as v5p:2x2x1, h100:4x8 or cpu:8"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--fit", action="store_true", help="find the largest micro-batch that fits")
    parser.add_argument(
        "--utilisation",
        type=in_range(float, ge=0.01, le=1),
        default=0.4,
        help="fraction of the peak FLOP/s, from which the days follow",
    )
    args = parser.parse_args(argv)
    with user_errors():
        config = from_config_dict(TrainConfig, args.config.to_dict())
        report = (fit if args.fit else plan)(config, args.topology, args.utilisation)
        print(json.dumps(report) if args.json else format_report(report))


def _plan_answer(argv: list[str]) -> None:
    args = _answer_parser().parse_args(argv)
    with user_errors():
        config = architecture(args.answer)
        if args.num_experts:
            config = upcycle_config(config, ExpertConfig(num_experts=args.num_experts))
        size = answer_size(config, args.batch, args.text_tokens, args.images, args.max_new_tokens)
        report = plan_answer(config, size, args.chip, args.dtype, not args.bounds_only)
        print(json.dumps(report) if args.json else format_answer(report))


def _answer_parser() -> argparse.ArgumentParser:
    parser = Parser(_ANSWER, prog="python -m moddistill.plan")
    parser.add_argument("--answer", required=True, metavar="MODEL", help="folder, or random:PRESET")
    parser.add_argument(
        "--chip",
        required=True,
        nargs="+",
        choices=(*CHIPS, "cpu"),
        help="chips, or cpu for this machine, whose speed is not known",
    )
    counts = {
        "num_experts": (0, "experts, 2 for a token, in every second layer of a dense model"),
        "batch": (1, "answers at once"),
        "text_tokens": (64, "tokens of a prompt beyond those of its images"),
        "images": (1, "images of a prompt"),
        "max_new_tokens": (48, "tokens of an answer"),
    }
    for name, (default, text) in counts.items():
        least = 0 if name in ("num_experts", "images") else 1
        number = in_range(int, ge=least, le=10**6)
        parser.add_argument(f"--{name}", type=number, default=default, help=text)
    parser.add_argument(
        "--dtype",
        choices=typing.get_args(Dtype),
        default="bfloat16",
        help="of parameters, computation and cache",
    )
    parser.add_argument(
        "--bounds_only",
        action="store_true",
        help="do not compile: no temporary memory, and no extra to install",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    main()
