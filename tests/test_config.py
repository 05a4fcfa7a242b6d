import dataclasses
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from moddistill.config import RecipeConfig, TrainConfig
from moddistill.configdict import from_config_dict, to_config_dict
from moddistill.errors import nearest


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
        ({"stepz": 3}, r"^config\.stepz is not a setting; .*did you mean 'steps'\?"),
        (
            {"optim": {"lrr": 3.0}},
            r"^config\.optim\.lrr is not a setting; .*did you mean 'optim\.lr'\?",
        ),
        (
            {"data": {"sources": {"a": {"pth": "x"}}}},
            r"^config\.data\.sources\.a\.pth .*did you mean 'data\.sources\.a\.path'\?",
        ),
        ({"learning_rate": 1.0}, r"^config\.learning_rate is .*did you mean 'optim\.lr'\?"),
        ({"moe": {"lr": 1.0}}, r"^config\.moe\.lr is not a setting; did you mean 'optim\.lr'\?"),
        ({"mesh": {"nodes": 1}}, r"^config\.mesh\.nodes is .*; accepted: data, fsdp, expert, tens"),
        ({"steps": "many"}, r"^config\.steps is 'many'; accepted: a value of type int"),
        ({"steps": 1.5}, r"^config\.steps is 1\.5; .*int"),
        ({"steps": True}, r"^config\.steps is True; .*int"),
        ({"teacher_weights": "int4"}, r"teacher_weights is 'int4'; accepted: dtype, int8"),
        ({"remat": True}, r"^config\.remat is True; accepted: none, products, full"),
        ({"optim": {"lr": "1e-3"}}, r"^config\.optim\.lr is '1e-3'; .*float"),
        ({"optim": 3}, r"^config\.optim is 3; .*OptimConfig"),
        ({"trainable": 3}, r"^config\.trainable is 3; .*str, tuple"),
        ({"dtype": "bf16"}, r"^config\.dtype is 'bf16'; accepted: bfloat16, float32"),
        (
            {"distillation": {"kd_shift": "late"}},
            r"^config\.distillation\.kd_shift is 'late'; accepted: correct, ",
        ),
        (
            {"distillation": {"kd_positions": "all"}},
            r"^config\.distillation\.kd_positions is 'all'; accepted: response, all_tokens",
        ),
        (
            {"preference": {"kind": "kto_pairs"}},
            r"^config\.preference\.kind is 'kto_pairs'; .*did you mean 'kto_pair'\?",
        ),
        ({"moe": {"placement": "(0, x)"}}, r"^config\.moe\.placement is '\(0, x\)'; accepted: a n"),
        ({"moe": {"placement": (0, "a")}}, r"^config\.moe\.placement\[1\] is 'a'; .*int"),
    ],
)
def test_bad_setting_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(TrainConfig, values)


def test_integers_serve_as_floats_and_lists_as_tuples():
    config = from_config_dict(TrainConfig, {"optim": {"lr": 1}, "trainable": ["decoder/.*"]})
    assert isinstance(config.optim.lr, float)
    assert config.trainable == ("decoder/.*",)


def test_nearest():
    assert nearest("dd2", ["d2d", "sft"]) == "; did you mean 'd2d'?"
    assert nearest("completely else", ["d2d", "sft"]) == ""


@pytest.fixture
def command_line(monkeypatch):
    """`command_line(*args)`: the config of `experiments/d2s.py:tiny` under those overrides."""

    def parse(*args):
        flag_values = flags.FlagValues()
        # ml_collections looks for overrides there.
        monkeypatch.setattr(sys, "argv", ["train", "--config=experiments/d2s.py:tiny", *args])
        holder = config_flags.DEFINE_config_file("config", flag_values=flag_values)
        flag_values(sys.argv)
        return from_config_dict(TrainConfig, holder.value.to_dict())

    return parse


# ml_collections loads config files in a way that Python 3.12 removes, and has another for 3.12.
load_module = pytest.mark.filterwarnings(
    "ignore:the load_module:DeprecationWarning", "ignore:.*_load_module_shim:ImportWarning"
)


@load_module
def test_override_on_the_command_line(command_line):
    config = command_line(
        "--config.optim.lr=0.5", "--config.steps=7", "--config.moe.placement=dense"
    )
    assert (config.optim.lr, config.steps, config.moe.placement) == (0.5, 7, "dense")


@load_module
@pytest.mark.parametrize("value", [False, True])
def test_a_field_without_a_value_can_be_typed(command_line, value):
    assert command_line().moe.norm_topk_prob is None
    assert command_line(f"--config.moe.norm_topk_prob={value}").moe.norm_topk_prob is value


@load_module
def test_tuples_can_be_typed(command_line):
    config = command_line("--config.moe.placement=(0, 2)", "--config.trainable=('decoder/.*',)")
    assert (config.moe.placement, config.trainable) == ((0, 2), ("decoder/.*",))


@load_module
@pytest.mark.parametrize(
    ("override", "wanted"), [("optim.lrr=3", "lr"), ("step=3", "steps"), ("mesh.fsp=2", "fsdp")]
)
def test_misspelt_override_suggests_the_right_name(command_line, override, wanted):
    with pytest.raises(Exception, match=f'[Dd]id you mean "{wanted}"'):
        command_line(f"--config.{override}")
