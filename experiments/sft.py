"""Supervised fine-tuning: trains teachers, and the baseline without distillation.

    python -m moddistill.train --config experiments/sft.py:student=qwen1.5-7b --workdir runs/teacher

Full size is LLaVA-1.5's second stage: 665k records, batch 128, 2e-5, one epoch. Its student is a
model folder whose projector `init` has trained. `:demo` is the teacher of `llava_mod.py:demo`.
"""

import ml_collections

from experiments import common
from moddistill.config import DataConfig, OptimConfig, TrainConfig, to_config_dict


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    options = common.parse(arg)
    if options["size"] == "tiny":
        return to_config_dict(tiny())
    if options["size"] == "demo":
        return to_config_dict(demo())
    student = options["student"]
    return to_config_dict(
        TrainConfig(
            stage="sft",
            student=f"runs/{student}/init/model",
            steps=665_000 // 128,
            batch_size=128,
            data=DataConfig(sources=common.source("data/llava_v1_5_mix665k.json")),
        )
    )


def demo() -> TrainConfig:
    """The demo's teacher on questions, from the weights that captions have given it."""
    return TrainConfig(
        stage="sft",
        student="runs/demo/captions/model",
        trainable=("decoder/.*", "projector/.*", "vision/.*"),
        steps=500,
        batch_size=64,
        log_every=20,
        save_every=500,
        dtype="float32",
        remat=False,
        data=DataConfig(sources=common.easy_vqa("train"), template="chatml", max_length=50),
        optim=OptimConfig(lr=1e-3, warmup_ratio=0.05),
    )


def tiny() -> TrainConfig:
    folder = common.tiny_data()
    return TrainConfig(
        stage="sft",
        student="random:tiny",
        tokenizer=str(folder / "tokenizer"),
        steps=4,
        batch_size=8,
        log_every=1,
        save_every=2,
        dtype="float32",
        data=DataConfig(
            sources=common.source(f"{folder}/conversations.json", str(folder)), max_length=128
        ),
        optim=OptimConfig(lr=1e-3),
    )
