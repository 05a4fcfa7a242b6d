"""Preference distillation: DPO or KTO on pairs of answers, with the teacher as the reference.

    python -m moddistill.train --config experiments/preference.py \\
        --workdir runs/qwen1.5-1.8b/preference
    python -m moddistill.train --config experiments/preference.py:pair=interleave \\
        --workdir runs/llava-interleave-qwen-0.5b-hf/preference
    python -m moddistill.train --config experiments/preference.py:pair=long-llava \\
        --workdir runs/long-llava/qwen2-0.5b/preference

Paper: 80k pairs of RLAIF-V (0.8M in the first version), batch 256, 2e-6, one epoch, KTO on pairs
(`--config.preference.kind=sigmoid` is DPO), beta 0.1; the teacher is the reference model; experts,
routers and projector train.
"""

import ml_collections

from experiments import common
from moddistill.config import DataConfig, OptimConfig, PreferenceConfig, SourceConfig, TrainConfig


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return common.choose(arg, full=full, demo=demo, tiny=tiny)


def full(models: common.Models) -> TrainConfig:
    return TrainConfig(
        stage="preference",
        student=models.after("d2s"),
        teacher=models.teacher,
        steps=80_000 // 256,
        batch_size=256,  # paper; 128 in the reference's script
        data=models.data("data/rlaif_v.json"),
        optim=OptimConfig(lr=2e-6),
    )


def demo() -> TrainConfig:
    heldout = SourceConfig(f"{common.EASY_VQA}/preference_test.json", f"{common.EASY_VQA}/images")
    return common.at_demo_size(
        TrainConfig(
            stage="preference",
            student="runs/demo/d2s/model",
            teacher="runs/demo/teacher/model",
            steps=400,
            heldout_steps=1200 // 32,
            data=DataConfig(sources=common.easy_vqa("preference_train"), heldout=heldout),
            optim=OptimConfig(lr=5e-4),
            # Of KTO on pairs the held-out reward accuracy is lower, and more answers turn wrong.
            preference=PreferenceConfig(kind="sigmoid"),
        )
    )


def tiny() -> TrainConfig:
    return common.at_tiny_size(
        TrainConfig(
            stage="preference",
            student="random:tiny",
            teacher="random:tiny-teacher",
            trainable=("decoder/.*",),
        )
    )
