import dataclasses
import math
import typing

import pytest

from moddistill.cli.experiment import read_experiment
from moddistill.cli.fields import sections
from moddistill.config import (
    DataConfig,
    OptimConfig,
    RecipeConfig,
    SourceConfig,
    StageName,
    TrainConfig,
)
from moddistill.configdict import annotations, check_values, from_config_dict, to_config_dict
from moddistill.errors import UserError, did_you_mean
from moddistill.ranges import Range
from moddistill.training.stages import STAGES


def test_round_trip(tiny_config):
    config = tiny_config("d2s", trainable=("decoder/.*",), moe={"placement": (0, 3)})
    assert from_config_dict(TrainConfig, to_config_dict(config).to_dict()) == config


def test_round_trip_of_nested_stages(tiny_config):
    recipe = RecipeConfig(order=("sft",), stages={"sft": tiny_config("sft")})
    assert from_config_dict(RecipeConfig, to_config_dict(recipe).to_dict()) == recipe


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, r"^config\.stepz is not a setting \(did you mean 'steps'\?\)"),
        (
            {"optim": {"lrr": 3.0}},
            r"^config\.optim\.lrr is not a setting \(did you mean 'optim\.lr'\?\)",
        ),
        (
            {"data": {"sources": {"a": {"pth": "x"}}}},
            r"^config\.data\.sources\.a\.pth .*did you mean 'data\.sources\.a\.path'\?",
        ),
        ({"learning_rate": 1.0}, r"^config\.learning_rate is .*did you mean 'optim\.lr'\?"),
        ({"moe": {"lr": 1.0}}, r"^config\.moe\.lr is not a setting \(did you mean 'optim\.lr'\?\)"),
        (
            {"mesh": {"nodes": 1}},
            r"^config\.mesh\.nodes is .*; expected one of data, fsdp, expert, tens",
        ),
        ({"steps": "many"}, r"^config\.steps: expected a value of type int, got 'many'"),
        ({"steps": 1.5}, r"^config\.steps: .*int, got 1\.5"),
        ({"steps": True}, r"^config\.steps: .*int, got True"),
        (
            {"teacher_quantization": "int4"},
            r"teacher_quantization: expected one of 'none', 'int8', got 'int4' .did .* 'int8'",
        ),
        ({"stage": "d2x"}, r"^config\.stage: expected one of 'sft', 'init', .*did you mean 'd2"),
        ({"remat": True}, r"^config\.remat: expected one of 'none', 'matmuls', 'full', got True"),
        ({"optim": {"lr": "1e-3"}}, r"^config\.optim\.lr: .*float, got '1e-3'"),
        ({"optim": 3}, r"^config\.optim: .*OptimConfig, got 3"),
        ({"trainable": 3}, r"^config\.trainable: .*str, tuple, got 3"),
        ({"dtype": "bf16"}, r"^config\.dtype: expected one of 'bfloat16', 'float32', got 'bf16'"),
        (
            {"distillation": {"kd_shift": "late"}},
            r"^config\.distillation\.kd_shift: expected .*'correct', .*, got 'late'",
        ),
        (
            {"distillation": {"kd_positions": "all"}},
            r"^config\.distillation\.kd_positions: expected .*'response', 'all_tokens', got 'all'",
        ),
        (
            {"preference": {"kind": "kto_pairs"}},
            r"^config\.preference\.kind: .*, got 'kto_pairs' \(did you mean 'kto_pair'\?\)",
        ),
        (
            {"moe": {"placement": "(0, x)"}},
            r"^config\.moe\.placement: .* a name, .*, got '\(0, x\)'",
        ),
        ({"moe": {"placement": "spars"}}, r"^config\.moe\.placement: .*, got 'spars' .*'sparse'"),
        ({"moe": {"placement": (0, "a")}}, r"^config\.moe\.placement\[1\]: .*int, got 'a'"),
    ],
)
def test_bad_setting_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(TrainConfig, values)


@pytest.mark.parametrize(
    ("accepted", "inside", "outside", "text"),
    [
        (Range(ge=0, le=1), (0, 0.5, 1), (-1, 2), ">= 0 and <= 1"),
        (Range(gt=0, le=1), (0.5, 1), (0, 2), "> 0 and <= 1"),
        (Range(ge=0, lt=1), (0, 0.5), (-1, 1), ">= 0 and < 1"),
        (Range(gt=0, lt=1), (0.5,), (0, 1), "> 0 and < 1"),
        (Range(ge=1), (1, 3e38), (0, 1e39, math.inf), ">= 1"),
    ],
)
def test_ranges(accepted, inside, outside, text):
    assert all(value in accepted for value in inside)
    assert not any(value in accepted for value in (*outside, math.nan, -math.inf))
    assert str(accepted) == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, "config.steps: expected >= 0 and <= 1000000000, got -1"),
        ({"optim": OptimConfig(lr=-1.0)}, "config.optim.lr: expected >= 0, got -1.0"),
        (
            {"optim": OptimConfig(lr=math.inf)},
            "config.optim.lr: expected a finite float32 >= 0, got inf",
        ),
        (
            {"data": DataConfig(sources={"a": SourceConfig(weight=0.0)})},
            "config.data.sources.a.weight: expected > 0 and <= 1000000.0, got 0.0",
        ),
    ],
)
def test_value_out_of_its_range_is_named(fields, message):
    with pytest.raises(UserError) as error:
        check_values(TrainConfig(**fields))
    assert str(error.value) == message


def numeric_fields(config, path=()):
    """Yields the path and type of each number in a config."""
    for name, (kind, _) in annotations(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from numeric_fields(value, (*path, name))
        elif kind in (int, float):
            yield (*path, name), kind


ABSURD = (math.nan, math.inf, -math.inf, 1e300, -1e30, True, "1")
HUGE = {int: (-(10**18), -(10**5000)), float: (10**400, -(10**400), 10**5000)}


@pytest.mark.parametrize(("path", "kind"), list(numeric_fields(TrainConfig())), ids=str)
def test_absurd_numbers_are_one_line_for_every_field(path, kind):
    huge = () if path[0] == "mesh" else HUGE[kind]  # a mesh is compared with the devices
    for value in (*ABSURD, *huge):
        values = {path[-1]: value}
        for name in reversed(path[:-1]):
            values = {name: values}
        with pytest.raises(UserError) as error:
            check_values(from_config_dict(TrainConfig, values))
        assert str(error.value).startswith(f"config.{'.'.join(path)}: expected ")
        assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_value_outside_an_enumeration_is_named():
    config = TrainConfig()
    object.__setattr__(config, "stage", "d2dd")  # type checks during tests refuse it in a call
    with pytest.raises(UserError, match=r"^config\.stage: expected one of 'sft', .* mean 'd2d'\?"):
        check_values(config)


def test_every_field_has_a_description_and_a_default_in_its_range():
    check_values(TrainConfig())
    check_values(RecipeConfig(stages={"a": TrainConfig()}))
    for section in sections(RecipeConfig):
        for name, kind, default, bounds, text in section.fields:
            place = f"{section.name}.{name}"
            assert text and text[0] != " " and text[-1] != ".", place
            assert bounds is None or default in bounds, place
            is_free = kind not in (int, float) or section.name.endswith("mesh")
            assert is_free or bounds is not None, f"{place} has no range"


def test_stages_of_the_config_are_those_of_the_table():
    assert typing.get_args(StageName) == tuple(STAGES)


def test_integers_serve_as_floats_and_lists_as_tuples():
    config = from_config_dict(TrainConfig, {"optim": {"lr": 1}, "trainable": ["decoder/.*"]})
    assert isinstance(config.optim.lr, float)
    assert config.trainable == ("decoder/.*",)


def test_the_closest_choice_is_suggested():
    assert did_you_mean("dd2", ["d2d", "sft"]) == " (did you mean 'd2d'?)"
    assert did_you_mean("completely else", ["d2d", "sft"]) == ""


def command_line(*args):
    """The config of `experiments/d2s.py:tiny` with overrides."""
    values, rest = read_experiment("experiments/d2s.py:tiny", args)
    assert rest == []
    return from_config_dict(TrainConfig, values.to_dict())


def test_override_on_the_command_line():
    config = command_line(
        "--config.optim.lr=0.5", "--config.steps=7", "--config.moe.placement=dense"
    )
    assert (config.optim.lr, config.steps, config.moe.placement) == (0.5, 7, "dense")


@pytest.mark.parametrize("value", [False, True])
def test_a_field_without_a_value_can_be_typed(value):
    assert command_line().moe.norm_topk_prob is None
    assert command_line(f"--config.moe.norm_topk_prob={value}").moe.norm_topk_prob is value


def test_tuples_can_be_typed():
    config = command_line("--config.moe.placement=(0, 2)", "--config.trainable=('decoder/.*',)")
    assert (config.moe.placement, config.trainable) == ((0, 2), ("decoder/.*",))


def test_booleans_and_the_value_of_the_last_override():
    config = command_line("--noconfig.scan", "--config.steps=7", "--config.steps", "8")
    assert (config.scan, config.steps) == (False, 8)
