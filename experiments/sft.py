"""Supervised fine-tuning: trains teachers, and the baseline without distillation.

    python -m moddistill.train --config experiments/sft.py:student=qwen1.5-7b \\
        --workdir runs/qwen1.5-7b/sft
    python -m moddistill.train --config experiments/sft.py:pair=interleave \\
        --workdir runs/llava-interleave-qwen-0.5b-hf/sft

The second is the baseline of a pair whose teacher can be downloaded (docs/teachers.md).

Full size is LLaVA-1.5's second stage: 665k records, batch 128, 2e-5, one epoch. It starts from a
model whose projector `init` has trained. `:demo` is the teacher of the demo on its questions.
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
        steps=665_000 // 128,
        batch_size=128,
        data=models.data("data/llava_v1_5_mix665k.json"),
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
