"""Trains one stage.

    python -m moddistill.train --config experiments/d2d.py --workdir runs/d2d

The same command again resumes an interrupted run, bit for bit. Settings of memory and speed may
change between the two, and `steps`: with more of them, a finished run goes on.
"""

from pathlib import Path

from ml_collections import ConfigDict

from moddistill.cli import run_experiment
from moddistill.config import TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.training.loop import start_logging, train


def main() -> None:
    """Entry point of `python -m moddistill.train`."""
    run_experiment(_train)


def _train(values: ConfigDict, workdir: str) -> None:
    start_logging()
    train(from_config_dict(TrainConfig, values.to_dict()), Path(workdir))


if __name__ == "__main__":
    main()
