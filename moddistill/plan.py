"""Compiles the real step of an experiment for a named accelerator, without owning one.

    python -m moddistill.plan --config experiments/d2s.py:student=qwen2-0.5b,teacher=qwen2-7b \\
        --topology v6e:1x1 --config.batch_size=8 [--json] [--fit]

Topologies are those of `accelerators.py`: TPUs with the extra `tpu` installed, GPUs with `cuda12`,
and simulated devices of this machine. Prints memory a chip and what it consists of, model FLOPs a
step, collectives, whether it fits, and how many days the experiment takes at a given utilisation.
`--fit` looks for the largest micro-batch that fits. Models need not exist: a path that is not there
stands for the preset it names.
"""

import json
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from moddistill.cli import parse_flags, plain_errors
from moddistill.config import TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.planning.planner import fit, format_report, plan


def main() -> None:
    """Entry point of `python -m moddistill.plan`."""
    values = config_flags.DEFINE_config_file("config", help_string="Experiment file.")
    flags.mark_flag_as_required("config")
    topology = flags.DEFINE_string(
        "topology", None, "Such as v5p:2x2x1, h100:4x8 or cpu:8.", required=True
    )
    as_json = flags.DEFINE_bool("json", False, "Print one JSON object.")
    largest = flags.DEFINE_bool("fit", False, "Look for the largest part of batch_size that fits.")
    utilisation = flags.DEFINE_float(
        "utilisation",
        0.4,
        "Share of the peak speed, for the days.",
        lower_bound=0.01,
        upper_bound=1,
    )

    def run(_: Any) -> None:
        jax.config.update("jax_platforms", "cpu")
        with plain_errors():
            config = from_config_dict(TrainConfig, values.value.to_dict())
            report = (fit if largest.value else plan)(config, topology.value, utilisation.value)
            print(json.dumps(report) if as_json.value else format_report(report))

    app.run(run, flags_parser=parse_flags)


if __name__ == "__main__":
    main()
