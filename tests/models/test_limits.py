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
        ("decoder", {"num_layers": 0}, r"decoder\.num_layers: expected an integer > 0 .*, got 0"),
        ("decoder", {"num_layers": 10**9}, r"decoder\.num_layers: .* <= 1,000, got 1000000000$"),
        ("decoder", {"rope_theta": float("inf")}, r"decoder\.rope_theta: expected .* got inf"),
        ("decoder", {"norm_eps": float("nan")}, r"decoder\.norm_eps: expected .* got nan"),
        ("decoder", {"num_kv_heads": 3}, r"kv_heads: .* divisor of decoder\.num_heads, 4, got 3"),
        ("decoder", {"head_dim": 5}, r"head_dim: expected an even number, .* got 5"),
        ("decoder", {"real_ids": ((0, 321),)}, r"real_ids: .* within 0 to .*, 320, got .*321"),
        ("decoder", {"real_ids": ()}, r"decoder\.real_ids: expected ranges .* got \(\)"),
        ("decoder", {"real_ids": ((0, 9), (9, 12))}, r"real_ids: .* not adjacent"),
        ("decoder", {"real_ids": ((-1, 9),)}, r"real_ids: .* within 0 to"),
        ("moe", {"num_experts": 1}, r"moe\.top_k: expected 1 to moe\.num_experts \(1\), got 2"),
        ("moe", {"num_experts": 10**9}, r"moe\.num_experts: .* <= 1,000, got 1000000000"),
        (
            "moe",
            {"moe_intermediate_size": 10**9},
            r"moe_intermediate_size: .* 0 to .*, got 1000000000",
        ),
        ("moe", {"placement": (7,)}, r"moe\.placement: .* got \(7,\)"),
        ("moe", {"capacity_factor": float("nan")}, r"moe\.capacity_factor: .* got nan"),
        (
            "vision",
            {"num_heads": 3},
            r"vision\.num_heads: .* divisor of vision\.hidden_size, 16, got 3",
        ),
        ("vision", {"patch_size": 29}, r"vision\.patch_size: .* not 0, got 29"),
        ("vision", {"image_size": 10_000}, r"patch_size: .* 100,000 .* not 509,796, got 14"),
        ("vision", {"std": (0.5, 0.0, 0.5)}, r"vision\.std: .* > 0 and <= 1"),
        ("vision", {"mean": (0.5, 0.5, float("nan"))}, r"vision\.mean: .* from 0 to 1"),
        ("", {"context": -1}, r"context: expected 0 to 1,000,000,000, got -1"),
        ("", {"image_token_id": -1}, r"image_token_id: expected 0 to .*, got -1"),
        ("", {"image_token_id": 5}, r"image_token_id: expected an id outside real_ids, got 5"),
        (
            "",
            {"projector": "mlp1000x_gelu"},
            r"projector: expected 'linear' .* got 'mlp1000x_gelu'",
        ),
    ],
)
def test_size_that_makes_no_sense_is_named(part, fields, message):
    with pytest.raises(ValueError, match=f"^model.json: .*{message}"):
        check_architecture(changed(part, **fields), "model.json")


def test_experts_of_all_layers_together_are_bounded():
    config = changed("decoder", num_layers=1000)
    moe = dataclasses.replace(config.decoder.moe, num_experts=1000, placement="every_layer")
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, moe=moe))
    with pytest.raises(
        ValueError, match="at most 50,000 experts in all layers, not 1,000,000, got 1000"
    ):
        check_architecture(config, "model.json")
