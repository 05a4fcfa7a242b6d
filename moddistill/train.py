"""Trains one stage.

    python -m moddistill.train --config experiments/d2d.py --workdir runs/d2d

The same command again resumes an interrupted run, bit for bit. Settings of memory and speed may
change between the two, and `steps`: with more of them, a finished run continues.
"""

from collections.abc import Sequence
from pathlib import Path

from moddistill.cli.parser import Parser, add_process_flags, user_errors
from moddistill.config import TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.distributed.processes import initialize, leaving_at_once
from moddistill.training.interruption import ctrl_c_ends_at_once
from moddistill.training.log_output import start_logging
from moddistill.training.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `python -m moddistill.train`."""
    parser = Parser(__doc__, prog="python -m moddistill.train", config=TrainConfig)
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    add_process_flags(parser)
    args = parser.parse_args(argv)
    with ctrl_c_ends_at_once(), leaving_at_once(), user_errors():
        initialize(args.coordinator, args.processes, args.process)
        start_logging()
        train(from_config_dict(TrainConfig, args.config.to_dict()), args.workdir)


if __name__ == "__main__":
    main()
