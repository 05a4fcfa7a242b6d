"""Dense to dense: distils the teacher into the student's language model and projector.

    python -m moddistill.train --config experiments/d2d.py --workdir runs/qwen1.5-1.8b/d2d

With a teacher and a student that can be downloaded, no earlier stage is needed:

    python -m moddistill.train --config experiments/d2d.py:pair=interleave \\
        --workdir runs/llava-interleave-qwen-0.5b-hf/d2d

and after stage `init` with the same pair:

    python -m moddistill.train --config experiments/d2d.py:pair=long-llava \\
        --workdir runs/long-llava/qwen2-0.5b/d2d

Paper: KL to the teacher only, 2.4M captions and conversations, batch 256, 2e-5. The reference's
script has one epoch and 128 a step. The six sets that the paper names have 2.7M records
(`python -m experiments.data`); `--config.steps=9375` is the paper's number of steps.
"""

import ml_collections

from experiments import common
from moddistill.config import DataConfig, OptimConfig, TrainConfig


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return common.choose(arg, full=full, demo=demo, tiny=tiny)


def full(models: common.Models) -> TrainConfig:
    return TrainConfig(
        stage="d2d",
        student=models.after("init"),
        teacher=models.teacher,
        # Paper: 256 samples; 128 in the reference's script. 96 rows hold 246 on average.
        batch_size=common.rows(256, models.samples_per_row),
        data=models.data("d2d"),
        optim=OptimConfig(lr=2e-5),
    )


def demo() -> TrainConfig:
    return common.at_demo_size(
        TrainConfig(
            stage="d2d",
            student="runs/demo/init/model",
            teacher="runs/demo/teacher/model",
            steps=600,
            data=DataConfig(sources=common.easy_vqa("train")),
            optim=OptimConfig(lr=1e-3),
        )
    )


def tiny() -> TrainConfig:
    return common.at_tiny_size(
        TrainConfig(stage="d2d", student="random:tiny", teacher="random:tiny-teacher")
    )
