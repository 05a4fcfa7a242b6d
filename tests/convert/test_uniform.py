"""Exports whose dense layers are equal experts compute the same model."""

import dataclasses
import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from moddistill.config import ExpertConfig
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.storage.model_folder import save_model
from moddistill.storage.shards import open_checkpoint

GB = 10**9


def text_config(folder):
    fields = json.loads((folder / "config.json").read_text())
    return fields.get("text_config", fields)


@pytest.fixture(scope="module")
def language(tmp_path_factory, tiny_architecture, random_params, small_tokenizer):
    """Returns a function for a language model with experts in some layers."""

    def make(qk_norm=False, **moe):
        root = tmp_path_factory.mktemp("language")
        config = tiny_architecture("tiny", ExpertConfig(**moe))
        decoder = dataclasses.replace(config.decoder, qk_norm=qk_norm, qkv_bias=not qk_norm)
        config = dataclasses.replace(config, vision=None, decoder=decoder)
        save_model(root / "model", config, random_params(config), small_tokenizer, {})
        return root / "model", config

    return make


@pytest.mark.slow
def test_uniform_export_of_a_student_has_the_same_logits(
    sparse, tmp_path, torch_logits, random_inputs
):
    student, out, config = sparse("CLIP and Qwen2")
    export_model(student, tmp_path / "uniform", max_shard_size=GB, uniform=True)
    load = AutoModelForImageTextToText.from_pretrained
    model, report = load(tmp_path / "uniform", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, images = random_inputs(config)
    found = torch_logits(model.eval(), tokens, images, config)
    expected = torch_logits(load(out).eval(), tokens, images, config)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert expected.std() > 0.5
    assert text_config(tmp_path / "uniform")["mlp_only_layers"] == []
    assert text_config(out)["mlp_only_layers"] == [1, 3]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 3, "top_k": 1},  # weights do not sum to one
        {"num_experts": 4, "top_k": 3, "norm_topk_prob": False},
        {"num_experts": 4, "top_k": 3, "placement": (2,), "qk_norm": True},
    ],
    ids=["top 1", "top 3 without norm_topk_prob", "Qwen3, top 3"],
)
def test_number_and_weights_of_experts_do_not_matter(
    settings, language, tmp_path, torch_logits, random_inputs
):
    model, config = language(**settings)
    tokens, _ = random_inputs(config)
    logits = []
    for uniform in (False, True):
        export_model(model, tmp_path / f"{uniform}", max_shard_size=GB, uniform=uniform)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{uniform}")
        logits.append(torch_logits(loaded.eval(), tokens))
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert np.std(logits[0]) > 0.1


def test_experts_of_a_dense_layer_are_its_copies_and_its_router_is_zero(sparse, tmp_path):
    student, out, _ = sparse("CLIP and Qwen2")
    export_model(student, tmp_path / "uniform", max_shard_size=GB, uniform=True)
    before, after = open_checkpoint(out), open_checkpoint(tmp_path / "uniform")
    prefix = "language_model.model.layers.1.mlp."
    for part in ("gate_proj", "up_proj", "down_proj"):
        dense = before[f"{prefix}{part}.weight"].read()
        for expert in range(4):
            copy = after[f"{prefix}experts.{expert}.{part}.weight"].read()
            np.testing.assert_array_equal(copy, dense)
    assert not np.any(after[f"{prefix}gate.weight"].read())
    assert not np.any(after[f"{prefix}shared_expert.up_proj.weight"].read())
    unchanged = [
        name for name in before if ".layers.1.mlp." not in name and ".layers.3." not in name
    ]
    for name in unchanged:
        np.testing.assert_array_equal(after[name].read(), before[name].read(), err_msg=name)


def test_uniform_export_imports_as_a_model_with_experts_everywhere(sparse, tmp_path):
    student, _, config = sparse("CLIP and Qwen2")
    export_model(student, tmp_path / "uniform", max_shard_size=GB, uniform=True)
    again = import_model(str(tmp_path / "uniform"), tmp_path / "again")
    assert again.decoder.moe_layers == tuple(range(config.decoder.num_layers))


def test_model_with_experts_everywhere_is_exported_as_it_is(language, tmp_path):
    model, _ = language(placement="every_layer")
    for name, uniform in (("plain", False), ("uniform", True)):
        export_model(model, tmp_path / name, max_shard_size=GB, uniform=uniform)
    plain, uniform = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "uniform")
    )
    assert plain == uniform


def test_dense_model_has_no_uniform_export(sparse, tmp_path):
    student, _, _ = sparse("CLIP and Qwen2")
    with pytest.raises(ValueError, match=r"--uniform: expected a sparse model, got a dense one"):
        export_model(student.parent / "dense", tmp_path / "x", max_shard_size=GB, uniform=True)
    assert not (tmp_path / "x").exists()


def test_experts_of_another_width_have_no_uniform_export(language, tmp_path):
    model, config = language(moe_intermediate_size=16)
    width = config.decoder.intermediate_size
    with pytest.raises(ValueError) as error:
        export_model(model, tmp_path / "out", max_shard_size=GB, uniform=True)
    assert str(error.value) == (
        f"--uniform: moe.moe_intermediate_size: expected {width}, the width of the dense layers, "
        "which become experts, got 16"
    )
