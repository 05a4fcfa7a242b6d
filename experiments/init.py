"""Initialisation: trains the projector by cross entropy.

    python -m moddistill.train --config experiments/init.py --workdir runs/qwen1.5-1.8b/init
    python -m moddistill.train --config experiments/init.py:pair=long-llava \\
        --workdir runs/long-llava/qwen2-0.5b/init

Paper: 0.6M captions (LLaVA-Pretrain, 558k), batch 512, 1e-4. The reference's script has one epoch,
1e-3 and 256 a step. Expected: the loss falls within the first hundred steps and then slowly.

A caption is the answer to its question in the teacher's template, `vicuna` by default, as in the
reference's script. LLaVA, TinyLLaVA and MoE-LLaVA train this stage on `<image>` and the caption
only: `--config.data.template=plain`.
"""

import ml_collections

from experiments import common
from moddistill.config import DataConfig, OptimConfig, TrainConfig
from moddistill.errors import invalid


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return common.choose(arg, full=full, demo=demo, tiny=tiny)


def full(models: common.Models) -> TrainConfig:
    if models.has_projector:
        expected = "a student without a trained projector (the recipe of this one begins with d2d)"
        raise invalid("stage init", models.student, expected)
    return TrainConfig(
        stage="init",
        student=models.student,
        # Paper: 512 samples; 256 in the reference's script. Captions are short: 3 fit a row of
        # 2,048, so that 176 rows hold 528.
        batch_size=common.rows(512, per_row=3),
        data=models.data("init"),
        optim=OptimConfig(lr=1e-4),  # paper; 1e-3 in the reference's script
    )


def demo() -> TrainConfig:
    """Joins the demo's language model and the teacher's vision encoder."""
    return common.at_demo_size(
        TrainConfig(
            stage="init",
            student="runs/demo/language/model",
            vision="runs/demo/teacher/model",
            steps=200,
            data=DataConfig(sources=common.easy_vqa("captions")),
            optim=OptimConfig(lr=1e-3),
        )
    )


def tiny() -> TrainConfig:
    return common.at_tiny_size(TrainConfig(stage="init", student="random:tiny"))
