import re

import pytest
from flax import linen as nn

from moddistill.config import MoeConfig, TrainConfig
from moddistill.model_folder import abstract_params
from moddistill.stages import STAGES, stage_of, trainable_patterns
from moddistill.tree import flatten, match


@pytest.fixture(scope="module")
def paths(tiny_architecture):
    """Parameter paths by sparsity."""
    architectures = {False: tiny_architecture(), True: tiny_architecture("tiny", MoeConfig())}
    return {k: list(flatten(nn.unbox(abstract_params(v)))) for k, v in architectures.items()}


def config_of(stage, **fields):
    return TrainConfig(stage=stage, teacher="t" if STAGES[stage].teacher else "", **fields)


def kinds(paths):
    """What parameters are, without their place in the stack."""
    return {re.sub(r"segment_\d+/block_\d+/", "", path).rsplit("/", 1)[0] for path in paths}


PROJECTOR = {"projector/linear_0", "projector/linear_1"}
MIXER = {f"decoder/attention/{name}" for name in ("query", "key", "value", "out")}
NORMS = {"decoder/attention_norm", "decoder/mlp_norm", "decoder/norm"}
DENSE = {f"decoder/mlp/{name}" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("stage", "trainable", "expected"),
    [
        ("sft", "paper", PROJECTOR | MIXER | NORMS | DENSE | {"decoder"}),
        ("init", "paper", PROJECTOR),
        ("d2d", "paper", PROJECTOR | MIXER | NORMS | DENSE | {"decoder"}),
        ("d2s", "paper", PROJECTOR | {"decoder/moe"}),
        ("d2s", "reference", PROJECTOR | {"decoder/moe"} | DENSE),
        ("preference", "paper", PROJECTOR | {"decoder/moe"}),
        ("preference", "reference", PROJECTOR | {"decoder/moe"} | DENSE),
    ],
)
def test_trainable_parameters(paths, stage, trainable, expected):
    sparse = stage in ("d2s", "preference")
    patterns = trainable_patterns(config_of(stage, trainable=trainable))
    assert kinds(match(paths[sparse], patterns, "here")) == expected


def test_trainable_patterns_of_the_config_come_first():
    assert trainable_patterns(config_of("sft", trainable=("vision/.*",))) == ("vision/.*",)


def test_unknown_trainable_set():
    with pytest.raises(ValueError, match=r"config\.trainable is 'papers'; accepted: 'paper'"):
        trainable_patterns(config_of("sft", trainable="papers"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage": "d2x"}, r"config\.stage is 'd2x'; accepted: sft, init, .*did you mean 'd2"),
        ({"stage": "d2d"}, r"config\.teacher is empty; stage 'd2d' needs a model folder"),
        (
            {"stage": "init", "teacher": "runs/t"},
            r"config\.teacher is 'runs/t'; stage 'init' takes no teacher",
        ),
    ],
)
def test_stage_and_teacher_must_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        stage_of(TrainConfig(**fields))


def test_table():
    table = {name: (row.teacher, row.sparse, row.records) for name, row in STAGES.items()}
    assert table == {
        "sft": (False, False, "conversation"),
        "init": (False, False, "conversation"),
        "d2d": (True, False, "conversation"),
        "d2s": (True, True, "conversation"),
        "preference": (True, False, "preference"),
    }
