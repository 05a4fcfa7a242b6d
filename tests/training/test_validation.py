import importlib
import math

import pytest

from experiments import llava_mod
from moddistill.config import RecipeConfig, SourceConfig, TrainConfig
from moddistill.configdict import from_config_dict
from moddistill.training import loop
from moddistill.training.validation import check_settings

STAGES = ("sft", "init", "d2d", "d2s", "preference")


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("sft", {"optim": {"eps": 0.0}}, r"optim\.eps: expected > 0 and <= 1, got 0\.0"),
        ("sft", {"optim": {"b1": 1.0}}, r"optim\.b1: expected >= 0 and < 1, got 1\.0"),
        ("sft", {"optim": {"b2": 1.0}}, r"optim\.b2: expected >= 0 and < 1, got 1\.0"),
        (
            "sft",
            {"preference": {"kind": "sigmoid"}},
            r"preference\.kind: expected 'kto_pair' in stage 'sft' "
            r"\(the default; read by preference only\), got 'sigmoid'",
        ),
        (
            "sft",
            {"distillation": {"kd_positions": "all_tokens"}},
            r"kd_positions: .* read by d2d, d2s only\), got 'all_tokens'",
        ),
        (
            "init",
            {"distillation": {"kd_weight": 0.5}},
            r"kd_weight: expected 1\.0 in stage 'init' .*, got 0\.5",
        ),
        ("d2s", {"preference": {"beta": 0.5}}, r"beta: expected 0\.1 in stage 'd2s' .*, got 0\.5"),
        (
            "d2d",
            {"distillation": {"ce_weight": 0.5}},
            r"ce_weight: expected 1\.0 .* read by sft, init, d2s only\), got 0\.5",
        ),
        (
            "preference",
            {"distillation": {"kd_weight": 2.0}},
            r"kd_weight: expected 1\.0 in stage 'preference' .*, got 2\.0",
        ),
        (
            "sft",
            {"distillation": {"relation_weight": 0.5}},
            r"relation_weight: expected 0\.0 in stage 'sft' .* read by d2d, d2s only\), got 0\.5",
        ),
        (
            "preference",
            {"distillation": {"image_kd_weight": 1.0}},
            r"image_kd_weight: expected 0\.0 in stage 'preference' .*, got 1\.0",
        ),
        (
            "d2s",
            {"distillation": {"image_kd_weight": -1.0}},
            r"image_kd_weight: expected >= 0, got -1\.0",
        ),
        (
            "d2s",
            {"teacher": "cache:x", "distillation": {"image_kd_weight": 1.0}},
            r"image_kd_weight: expected 0\.0, since a cache has the tokens of answers only, got 1",
        ),
        (
            "d2d",
            {"teacher": "cache:x", "distillation": {"relation_weight": 0.5}},
            r"relation_weight: expected 0\.0, since a cache has .*, got 0\.5$",
        ),
        (
            "d2s",
            {"distillation": {"mix": 0.5}},
            r"distillation\.mix: expected its default unless distillation\.divergence=jsd, skew_kl "
            r"or skew_reverse_kl, got 0\.5",
        ),
        (
            "d2s",
            {"distillation": {"divergence": "jsd", "mix": 0.0}},
            r"distillation\.mix: expected > 0 and < 1, got 0\.0",
        ),
        (
            "d2s",
            {"distillation": {"divergence": "skew_kl", "mix": 1.0}},
            r"distillation\.mix: expected > 0 and < 1, got 1\.0",
        ),
        (
            "sft",
            {"on_policy": {"share": 0.5}},
            r"on_policy\.share: expected 0\.0 in stage 'sft' .* read by d2d, d2s only\), got 0\.5",
        ),
        (
            "preference",
            {"on_policy": {"top_p": 0.9}},
            r"on_policy\.top_p: expected 1\.0 in stage 'preference' .*, got 0\.9",
        ),
        (
            "d2d",
            {"on_policy": {"share": 1.1}},
            r"on_policy\.share: expected >= 0 and <= 1, got 1\.1",
        ),
        (
            "d2d",
            {"on_policy": {"temperature": 0.0}},
            r"on_policy\.temperature: expected >= 0\.0001 and <= 10000\.0, got 0\.0",
        ),
        (
            "d2d",
            {"on_policy": {"tokens": 64}},
            r"on_policy: expected its defaults, since on_policy\.share is 0, got OnPolicy",
        ),
        (
            "d2d",
            {"on_policy": {"share": 0.5}},
            r"data\.packing: expected False, since on_policy\.share is 0\.5, got True$",
        ),
        (
            "d2d",
            {"on_policy": {"share": 0.5}, "teacher": "cache:c", "data": {"packing": False}},
            r"on_policy\.share: expected 0, since the teacher 'cache:c' cannot score .*, got 0\.5$",
        ),
        (
            "d2s",
            {
                "on_policy": {"share": 0.5},
                "data": {"packing": False},
                "distillation": {"kd_weight": 0.0},
            },
            r"kd_weight: expected > 0, since on_policy\.share is 0\.5, got 0\.0$",
        ),
        (
            "d2s",
            {"on_policy": {"share": 1.0}, "data": {"packing": False}},
            r"on_policy\.share: expected < 1, or distillation\.ce_weight=0, .*, got 1\.0$",
        ),
        (
            "sft",
            {"heldout_steps": 1},
            r"heldout\.path: expected a file, since heldout_steps is 1, got ''$",
        ),
        (
            "sft",
            {"data": {"heldout": SourceConfig("a.json")}},
            r"heldout_steps: expected >= 1, since data\.heldout\.path is 'a\.json', got 0$",
        ),
    ],
)
def test_settings_out_of_range_or_never_read_are_refused(tiny_config, stage, fields, message):
    with pytest.raises(ValueError, match=rf"^config\..*{message}"):
        check_settings(tiny_config(stage, **fields))


@pytest.mark.parametrize(
    ("stage", "fields", "message"),
    [
        ("sft", {"grad_accum_steps": 0}, r"config\.grad_accum_steps: expected >= 1, got 0"),
        ("sft", {"log_every": 0}, r"config\.log_every: expected >= 1, got 0"),
        ("sft", {"steps": -1}, r"config\.steps: expected >= 0 and <= 1000000000, got -1"),
        ("sft", {"logits_chunk_size": 0}, r"config\.logits_chunk_size: expected >= 1, got 0"),
        (
            "sft",
            {"grad_accum_steps": 3},
            r"config\.batch_size: expected a multiple of grad_accum_steps \(3\), got 8$",
        ),
        (
            "d2d",
            {"teacher": ""},
            r"config\.teacher: expected a model, since stage 'd2d' .*, got ''$",
        ),
        (
            "sft",
            {"teacher": "runs/t"},
            r"expected '', since stage 'sft' has no teacher, got 'runs/t'$",
        ),
        (
            "d2d",
            {"teacher": "runs/none/model"},
            r"^config\.teacher: expected a model folder, .* got 'runs/none/model'",
        ),
        ("sft", {"seed": -1}, r"config\.seed: expected >= 0 and <= 4294967295, got -1"),
        ("sft", {"optim": {"lr": math.nan}}, r"config\.optim\.lr: expected .* >= 0, got nan"),
        (
            "sft",
            {"optim": {"eps": 0.0}},
            r"config\.optim\.eps: expected > 0 and <= 1, got 0\.0",
        ),
        (
            "sft",
            {"optim": {"clip_norm": -1.0}},
            r"config\.optim\.clip_norm: expected >= 0, got -1\.0",
        ),
        (
            "d2d",
            {"moe": {"top_k": 99}},
            r"config\.moe: expected its .* since stage 'd2d' makes no ex",
        ),
        (
            "d2d",
            {"upcycle": {"method": "drop"}},
            r"config\.upcycle: expected its .* 'd2d' makes no",
        ),
        ("d2s", {"moe": {"num_experts": 10**9}}, r"^config\.moe\.num_experts: .*, got 1000000000"),
        (
            "d2s",
            {"moe": {"top_k": 10**9}},
            r"^config\.moe\.top_k: expected 1 to .*, got 1000000000",
        ),
        (
            "d2s",
            {"upcycle": {"method": "noise", "noise_std": 1e5}},
            r"^config\.upcycle\.noise_std: expected >= 0 and <= 10000.0, got 100000\.0$",
        ),
        (
            "d2s",
            {"upcycle": {"method": "noise", "noise_std": math.inf}},
            r"^config\.upcycle\.noise_std: expected a finite float32 >= 0 and <= 10000.0, got inf$",
        ),
        (
            "d2s",
            {"moe": {"dispatch": "capacity", "capacity_factor": 1e7}},
            r"^config\.moe\.capacity_factor: expected > 0 and <= 1,000,000, got 10000000\.0",
        ),
        (
            "d2d",
            {"distillation": {"kd_weight": 0.0}},
            r"config\.distillation\.kd_weight or image_kd_weight: expected > 0, got 0\.0",
        ),
        (
            "d2s",
            {"distillation": {"kd_weight": 0.0, "ce_weight": 0.0}},
            r"distillation\.kd_weight or ce_weight or image_kd_weight: expected > 0, got 0\.0",
        ),
        ("sft", {"heldout_steps": 1}, r"config\.data\.heldout\.path: expected a file, .*, got ''$"),
        (
            "sft",
            {"profile_steps": (3,)},
            r"profile_steps: expected \(\) or .*, got \(3,\)$",
        ),
        ("sft", {"profile_steps": (3, 9)}, r"<= last <= 4, got \(3, 9\)$"),
        (
            "sft",
            {"teacher_offload": True},
            r"teacher_offload: expected False, .* empty, got True$",
        ),
        (
            "sft",
            {"trainable": ("decode/.*",)},
            r"config\.trainable: expected a pattern .*, got 'decode/",
        ),
        ("sft", {"mesh": {"data": 3}}, r"^config\.mesh: expected .* product 8, .*got data=3, "),
    ],
)
def test_run_with_invalid_settings_leaves_no_model(tiny_config, tmp_path, stage, fields, message):
    with pytest.raises(ValueError, match=message):
        loop.train(tiny_config(stage, **fields), tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("divergence", ["jsd", "skew_kl", "skew_reverse_kl"])
def test_mix_is_accepted_where_it_is_read(tiny_config, divergence):
    check_settings(tiny_config("d2s", distillation={"divergence": divergence, "mix": 0.5}))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", ["full", "demo", "tiny"])
def test_settings_of_the_experiments_are_accepted(stage, size):
    values = importlib.import_module(f"experiments.{stage}").get_config(size)
    check_settings(from_config_dict(TrainConfig, values.to_dict()))


@pytest.mark.parametrize("size", ["full", "demo"])
def test_settings_of_the_recipe_are_accepted(size):
    config = from_config_dict(RecipeConfig, llava_mod.get_config(size).to_dict())
    for stage in config.stages.values():
        check_settings(stage)


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ("d2d", {"on_policy": {"share": 1.0}}),
        ("d2s", {"on_policy": {"share": 1.0}, "distillation": {"ce_weight": 0.0}}),
    ],
)
def test_the_student_may_answer_all_rows_where_no_term_needs_labels(tiny_config, stage, fields):
    check_settings(tiny_config(stage, data={"packing": False}, **fields))
