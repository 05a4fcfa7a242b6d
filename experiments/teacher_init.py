"""Initialisation of a teacher as in LLaVA-1.5: trains the projector by cross entropy.

    python -m moddistill.train --config experiments/teacher_init.py:student=qwen1.5-7b \\
        --workdir runs/qwen1.5-7b/init
    python -m moddistill.train --config experiments/sft.py:student=qwen1.5-7b \\
        --workdir runs/qwen1.5-7b/sft

The paper trains its teacher as LLaVA-1.5 is trained. Of stage `init` of the student this differs in
learning rate (1e-3), batch (256) and template (`plain`: `<image>` and the caption). `sft` then
teaches the conversation format.
"""

import dataclasses

import ml_collections

from experiments import common, init
from moddistill.config import OptimConfig, TrainConfig


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return common.choose(arg, full=full)


def full(models: common.Models) -> TrainConfig:
    config = init.full(models)
    return dataclasses.replace(
        config,
        batch_size=common.rows(256, per_row=3),  # LLaVA-1.5: 256 samples. 80 rows hold 240.
        data=dataclasses.replace(config.data, template="plain"),
        optim=OptimConfig(lr=1e-3),
    )
