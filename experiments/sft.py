"""Supervised fine-tuning: trains teachers, and the baseline without distillation.

    python -m moddistill.train --config experiments/sft.py:student=qwen1.5-7b \\
        --workdir runs/qwen1.5-7b/sft
    python -m moddistill.train --config experiments/sft.py:pair=interleave \\
        --workdir runs/llava-interleave-qwen-0.5b-hf/sft

The second is the baseline of a pair whose teacher can be downloaded (docs/teachers.md).

Full size is LLaVA-1.5's second stage: 665k records, batch 128, 2e-5, one epoch. It starts from the
model of `init`, or of `teacher_init`, which is LLaVA-1.5's first stage, in `runs/qwen1.5-7b/init`.
LLaVA-1.5 also groups records of equal kind and length in a step, which this does not. `:demo` is
the teacher of the demo on its questions.
"""

import ml_collections

from experiments import common
from moddistill.config import DataConfig, OptimConfig, TrainConfig


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return common.choose(arg, full=full, demo=demo, tiny=tiny)


def full(models: common.Models) -> TrainConfig:
    return TrainConfig(
        stage="sft",
        student=models.after("init"),
        # LLaVA-1.5: 128 samples. 48 rows hold 123 on average.
        batch_size=common.rows(128, models.samples_per_row),
        data=models.data("sft"),
        optim=OptimConfig(lr=2e-5),
    )


def demo() -> TrainConfig:
    return common.at_demo_size(
        TrainConfig(
            stage="sft",
            student="runs/demo/captions/model",
            trainable=("decoder/.*", "projector/.*", "vision/.*"),
            steps=400,
            data=DataConfig(sources=common.easy_vqa("train")),
            optim=OptimConfig(lr=5e-4),
        )
    )


def tiny() -> TrainConfig:
    return common.at_tiny_size(TrainConfig(stage="sft", student="random:tiny"))
