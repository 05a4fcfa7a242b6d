"""The whole recipe: init, d2d, d2s, preference.

    python -m moddistill.recipe --config experiments/llava_mod.py --workdir runs/qwen1.5-1.8b

Full size needs a teacher, `runs/qwen1.5-7b/sft/model`, and a student with a tower,
`models/qwen1.5-1.8b`. Of a pair with a published teacher (docs/teachers.md), `interleave` needs
neither and has no `init`; `long-llava` needs the student, `models/qwen2-0.5b`.

    python -m moddistill.recipe --config experiments/llava_mod.py:pair=interleave \\
        --workdir runs/llava-interleave-qwen-0.5b-hf
    python -m moddistill.recipe --config experiments/llava_mod.py:pair=long-llava \\
        --workdir runs/long-llava/qwen2-0.5b

    python -m moddistill.recipe --config experiments/llava_mod.py:demo --workdir runs/demo

The demo begins earlier, since it may use nothing but the published pictures and questions of easy-
VQA. `teacher_language` and `language` train the language models of teacher and student on text, in
place of a pretrained Qwen; `captions` trains the teacher's tower and projector from scratch,
before a frozen language model; `teacher` goes on with questions.
"""

import dataclasses

import ml_collections

from experiments import common, d2d, d2s, init, preference, sft
from moddistill.config import DataConfig, OptimConfig, RecipeConfig, TaskConfig, TrainConfig


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    return common.choose(arg, full=full, demo=demo)


def full(models: common.Models) -> RecipeConfig:
    stages = {"init": init, "d2d": d2d, "d2s": d2s, "preference": preference}
    if models.has_projector:
        del stages["init"]
    return _recipe(
        {name: stage.full(models) for name, stage in stages.items()}, runs=f"{models.runs}/"
    )


def demo() -> RecipeConfig:
    recipe = _recipe(
        {
            "teacher_language": language("random:demo-teacher-language", seed=1),
            "captions": captions(),
            "teacher": sft.demo(),
            "language": language("random:demo-language"),
            "init": init.demo(),
            "d2d": d2d.demo(),
            "d2s": d2s.demo(),
            "preference": preference.demo(),
        },
        runs="runs/demo/",
    )
    return dataclasses.replace(
        recipe,
        tasks={"easy_vqa": TaskConfig(task="easy_vqa", data=common.EASY_VQA)},
        evaluated=("teacher", "init", "d2d", "d2s", "preference"),
    )


def language(student: str, seed: int = 0) -> TrainConfig:
    """A language model from scratch on the demo's text alone.

    It comes to compare question and caption all at once, sooner or later by `seed`; the seeds here
    are of those that do so in the first half.
    """
    return common.at_demo_size(
        TrainConfig(
            stage="sft",
            student=student,
            tokenizer=f"{common.EASY_VQA}/tokenizer",
            seed=seed,
            trainable=("decoder/.*",),
            steps=1000,
            data=DataConfig(sources=common.easy_vqa("text"), max_length=38),
            optim=OptimConfig(lr=1.5e-3, weight_decay=0.05),
        )
    )


def captions() -> TrainConfig:
    """A tower from scratch; captions show it shapes far sooner than questions do."""
    return common.at_demo_size(
        TrainConfig(
            stage="sft",
            student="runs/demo/teacher_language/model",
            vision="random:demo-teacher",
            trainable=("projector/.*", "vision/.*"),
            steps=1200,
            data=DataConfig(sources=common.easy_vqa("captions"), max_length=66),
            optim=OptimConfig(lr=1e-3, weight_decay=0.05),
        )
    )


def _recipe(stages: dict[str, TrainConfig], runs: str) -> RecipeConfig:
    """The stages in this order, with paths below `runs` moved to the recipe's own folder."""

    def moved(path: str) -> str:
        return path.replace(runs, "{workdir}/", 1) if path.startswith(runs) else path

    return RecipeConfig(
        order=tuple(stages),
        stages={
            name: dataclasses.replace(
                stage,
                student=moved(stage.student),
                teacher=moved(stage.teacher),
                vision=moved(stage.vision),
            )
            for name, stage in stages.items()
        },
    )
