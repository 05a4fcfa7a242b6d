"""Compiles the real step of an experiment for a named accelerator, without owning one.

    python -m moddistill.plan --config experiments/d2s.py:student=qwen2-0.5b,teacher=qwen2-7b \\
        --topology v6e:1x1 --config.batch_size=8 [--json] [--fit]

Topologies are TPUs with the extra `tpu` installed, GPUs with `cuda12`, and simulated devices of
this machine; moddistill/distributed/accelerators.py lists them. Prints memory per chip by kind,
model FLOPs per step, collectives, whether the step fits, and the days that the experiment takes.
Models need not exist: a path that does not exist is planned as the preset that it names.
"""

import json
from collections.abc import Sequence

import jax

from moddistill.cli.parser import Parser, in_range, user_errors
from moddistill.config import TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.planning.planner import fit, format_report, plan


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.plan`."""
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
    jax.config.update("jax_platforms", "cpu")
    with user_errors():
        config = from_config_dict(TrainConfig, args.config.to_dict())
        report = (fit if args.fit else plan)(config, args.topology, args.utilisation)
        print(json.dumps(report) if args.json else format_report(report))


if __name__ == "__main__":
    main()
