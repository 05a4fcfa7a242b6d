import dataclasses

import pytest

from moddistill.config import ExpertConfig
from moddistill.models.limits import check_architecture
from moddistill.models.presets import PRESETS, preset
from moddistill.models.upcycle import upcycle_config


def changed(part, **fields):
    config = upcycle_config(preset("tiny"), ExpertConfig())
    if part == "moe":
        moe = dataclasses.replace(config.decoder.moe, **fields)
        part, fields = "decoder", {"moe": moe}
    if part:
        fields = {part: dataclasses.replace(getattr(config, part), **fields)}
    return dataclasses.replace(config, **fields)


def test_all_presets_are_within_the_limits():
    for name, config in PRESETS.items():
        check_architecture(config, name)
    check_architecture(upcycle_config(preset("qwen2-7b"), ExpertConfig(num_experts=64)), "sparse")


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("decoder", {"layers": 0}, r"decoder\.layers is 0; accepted: a whole number above 0"),
        ("decoder", {"layers": 10**9}, r"decoder\.layers is 1000000000; .* at most 1,000$"),
        ("decoder", {"rope_theta": float("inf")}, r"decoder\.rope_theta is inf; accepted"),
        ("decoder", {"norm_eps": float("nan")}, r"decoder\.norm_eps is nan; accepted"),
        ("decoder", {"kv_heads": 3}, r"kv_heads is 3; .* divides decoder\.heads, 4"),
        ("decoder", {"head_dim": 5}, r"head_dim is 5; accepted: an even number"),
        ("decoder", {"real_ids": ((0, 321),)}, r"real_ids is .*321.* within 0 to .*, 320"),
        ("decoder", {"real_ids": ()}, r"decoder\.real_ids is \(\); accepted: ranges"),
        ("decoder", {"real_ids": ((0, 9), (9, 12))}, r"real_ids is .* apart from each other"),
        ("decoder", {"real_ids": ((-1, 9),)}, r"real_ids is .* within 0 to"),
        ("moe", {"num_experts": 1}, r"moe\.top_k is 2; accepted: 1 to moe\.num_experts \(1\)"),
        ("moe", {"num_experts": 10**9}, r"moe\.num_experts is 1000000000; .* at most 1,000"),
        ("moe", {"moe_intermediate_size": 10**9}, r"moe_intermediate_size is 1000000000; .* 0 to"),
        ("moe", {"placement": (7,)}, r"moe\.placement is \(7,\)"),
        ("moe", {"capacity_factor": float("nan")}, r"moe\.capacity_factor is nan"),
        ("vision", {"heads": 3}, r"vision\.heads is 3; .* divides vision\.width, 16"),
        ("vision", {"patch_size": 29}, r"vision\.patch_size is 29 .* 0 patches"),
        ("vision", {"image_size": 10_000}, r"patch_size is 14 .* 509,796 patches; .* 100,000"),
        ("vision", {"std": (0.5, 0.0, 0.5)}, r"vision\.std is .* above 0, at most 1"),
        ("vision", {"mean": (0.5, 0.5, float("nan"))}, r"vision\.mean is .* from 0 to 1"),
        ("", {"image_token": -1}, r"image_token is -1; accepted: 0 to"),
        ("", {"image_token": 5}, r"image_token is 5; accepted: an id that is in no real_ids"),
        ("", {"projector": "mlp1000x_gelu"}, r"projector is 'mlp1000x_gelu'; accepted: linear"),
    ],
)
def test_size_that_makes_no_sense_is_named(part, fields, message):
    with pytest.raises(ValueError, match=f"^model.json: .*{message}"):
        check_architecture(changed(part, **fields), "model.json")


def test_experts_of_all_layers_together_are_bounded():
    config = changed("decoder", layers=1000)
    moe = dataclasses.replace(config.decoder.moe, num_experts=1000, placement="dense")
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, moe=moe))
    with pytest.raises(ValueError, match="1,000,000 in all layers; accepted: at most 50,000"):
        check_architecture(config, "model.json")
