"""The complete recipe: init, d2d, d2s, preference.

    python -m moddistill.recipe --config experiments/llava_mod.py --workdir runs/qwen1.5-1.8b

Full size needs a teacher, `runs/qwen1.5-7b/sft/model` (`teacher_init.py`, then `sft.py`), and a
student with a vision encoder, `models/qwen1.5-1.8b`. Of the pairs with a published teacher
(docs/teachers.md), `interleave` needs neither and has no `init`; `long-llava` needs the student,
`models/qwen2-0.5b`.

    python -m moddistill.recipe --config experiments/llava_mod.py:pair=interleave \\
        --workdir runs/llava-interleave-qwen-0.5b-hf
    python -m moddistill.recipe --config experiments/llava_mod.py:pair=long-llava \\
        --workdir runs/long-llava/qwen2-0.5b

    python -m moddistill.recipe --config experiments/llava_mod.py:demo --workdir runs/demo

    python -m moddistill.recipe --config experiments/llava_mod.py:demo,cached --workdir runs/cached

`demo,cached` trains `d2s` and `preference` from caches of the teacher. The demo has earlier stages,
since its only data is the published images and questions of easy-VQA. `teacher_language` and
`language` train the language models of teacher and student on text, in place of a pretrained Qwen;
`captions` trains the teacher's vision encoder and projector from scratch with a frozen language
model; `teacher` continues with questions.
"""

import dataclasses

import ml_collections

from experiments import common, d2d, d2s, init, preference, sft
from moddistill.config import (
    CacheConfig,
    DataConfig,
    OptimConfig,
    RecipeConfig,
    TaskConfig,
    TrainConfig,
)
from moddistill.configdict import to_config_dict


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    if arg == "demo,cached":
        return to_config_dict(cached_demo())
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


def cached_demo() -> RecipeConfig:
    caches = {name: CacheConfig(ids=16) for name in ("d2s", "preference")}
    return dataclasses.replace(demo(), caches=caches)


def language(student: str, seed: int = 0) -> TrainConfig:
    """Returns the stage that trains a language model from scratch on the demo's text.

    The ability to compare question and caption appears suddenly, at a step that depends on `seed`;
    with the seeds used here, in the first half.
    """
    return common.at_demo_size(
        TrainConfig(
            stage="sft",
            student=student,
            tokenizer=f"{common.EASY_VQA}/tokenizer",
            seed=seed,
            trainable=("decoder/.*",),
            steps=1000,
            data=DataConfig(sources=common.easy_vqa("text")),
            optim=OptimConfig(lr=1.5e-3, weight_decay=0.05),
        ),
        rows=4,  # 31 samples without images
    )


def captions() -> TrainConfig:
    """Returns the stage that trains a vision encoder from scratch.

    It learns shapes from captions in far fewer steps than from questions.
    """
    return common.at_demo_size(
        TrainConfig(
            stage="sft",
            student="runs/demo/teacher_language/model",
            vision="random:demo-teacher",
            trainable=("projector/.*", "vision/.*"),
            steps=1200,
            data=DataConfig(sources=common.easy_vqa("captions")),
            optim=OptimConfig(lr=1e-3, weight_decay=0.05),
        )
    )


def _recipe(stages: dict[str, TrainConfig], runs: str) -> RecipeConfig:
    """Returns the stages in this order, with paths below `runs` moved to the recipe's folder."""

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
