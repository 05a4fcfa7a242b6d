import dataclasses
import re

import pytest
from flax import linen as nn

from moddistill.config import ExpertConfig, TrainConfig
from moddistill.models.vlm import abstract_params
from moddistill.params import flatten
from moddistill.training.stages import STAGES, stage_of, trainable_paths


@pytest.fixture(scope="module")
def paths(tiny_architecture):
    """Parameter paths by sparsity."""
    architectures = {False: tiny_architecture(), True: tiny_architecture("tiny", ExpertConfig())}
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
def test_trainable_sets_match_the_expected_parameters(paths, stage, trainable, expected):
    sparse = stage in ("d2s", "preference")
    # A word typed over a tuple arrives as a tuple of that word.
    for chosen in (trainable, (trainable,)):
        config = config_of(stage, trainable=chosen)
        assert kinds(trainable_paths(config, paths[sparse])) == expected


def test_reference_set_without_a_dense_layer(paths):
    experts = [path for path in paths[True] if "/mlp/" not in path]
    for stage in ("d2s", "preference"):
        found = trainable_paths(config_of(stage, trainable="reference"), experts)
        assert found == trainable_paths(config_of(stage), experts)


def test_parameters_that_are_never_computed_do_not_train(paths):
    never = {f"vision/{name}/scale" for name in ("unused", "post_norm")}
    tower = {path for path in paths[False] if path.startswith("vision/")} | never
    found = trainable_paths(config_of("sft", trainable=("vision/.*",)), sorted(tower))
    assert {path.split("/")[1] for path in tower - found} == {"unused", "post_norm"}
    assert "vision/patch/kernel" in found


def test_trainable_set_without_computed_parameters_is_refused(paths):
    with pytest.raises(ValueError, match=r"that is computed, got \('vision/post_norm/\.\*',\)$"):
        trainable_paths(config_of("sft", trainable=("vision/post_norm/.*",)), paths[False])


@pytest.mark.parametrize("name", ["papers", "reference "])
def test_unknown_trainable_set_is_refused(paths, name):
    with pytest.raises(
        ValueError, match=rf"config\.trainable: expected 'paper', .*, got '{name}'$"
    ):
        trainable_paths(config_of("sft", trainable=name), paths[False])


def test_every_field_of_the_losses_is_read_somewhere():
    read = {name for row in STAGES.values() for name in row.reads}
    config = TrainConfig()
    assert read == {
        f"{part}.{field.name}"
        for part in ("distillation", "on_policy", "preference", "router")
        for field in dataclasses.fields(getattr(config, part))
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"stage": "d2d"},
            r"config\.teacher: expected a model, since stage 'd2d' has a teacher, got ''$",
        ),
        (
            {"stage": "init", "teacher": "runs/t"},
            r"config\.teacher: expected '', since stage 'init' has no teacher, got 'runs/t'$",
        ),
    ],
)
def test_unknown_stage_or_wrong_teacher_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        stage_of(TrainConfig(**fields))


def test_stage_table_matches_the_paper():
    table = {name: (row.teacher, row.sparse, row.records) for name, row in STAGES.items()}
    assert table == {
        "sft": (False, False, "conversation"),
        "init": (False, False, "conversation"),
        "d2d": (True, False, "conversation"),
        "d2s": (True, True, "conversation"),
        "preference": (True, False, "preference"),
    }
