"""Initialisation: trains the projector by cross entropy.

    python -m moddistill.train --config experiments/init.py --workdir runs/qwen1.5-1.8b/init
    python -m moddistill.train --config experiments/init.py:pair=long-llava \\
        --workdir runs/long-llava/qwen2-0.5b/init

Paper: 0.6M captions (LLaVA-Pretrain), batch 512, 1e-4, one epoch. The reference's script has 1e-3
and 256 a step. Expected: the loss falls within the first hundred steps and then slowly.
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
        steps=600_000 // 512,
        batch_size=512,  # paper; 256 in the reference's script
        data=models.data("data/blip_laion_cc_sbu_558k.json"),
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
