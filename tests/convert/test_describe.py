"""Output of `inspect` for folders and files."""

import json
import math

import pytest
from safetensors.numpy import load_file, save_file

from moddistill.config import ExpertConfig
from moddistill.convert.describe import describe
from moddistill.storage.model_folder import save_model
from tests import torch_or_skip as torch
from tests.convert import hf_folders as hf


def count(state):
    return sum(math.prod(x.shape) for x in state.values())


def test_inspect_of_a_model_folder(tiny_models):
    facts = describe(str(tiny_models["dense"]))
    assert facts["uses"] == ["train", "generate", "evaluate", "upcycle", "export"]
    assert facts["parameters"] == sum(facts["parts"].values()) > facts["activated"]
    assert "upcycle" not in describe(str(tiny_models["sparse"]))["uses"]


def test_inspect_reports_why_a_model_folder_cannot_be_exported(
    tmp_path, tiny_architecture, init, small_tokenizer
):
    config = tiny_architecture("tiny", ExpertConfig(residual=True))
    save_model(tmp_path / "model", config, init(config), small_tokenizer, {})
    facts = describe(str(tmp_path / "model"))
    assert facts["uses"] == ["train", "generate", "evaluate"]
    assert "moe.residual: expected false" in facts["not exported"]


def test_inspect_of_a_vision_tower(tmp_path):
    folder = hf.save(hf.clip_tower(), tmp_path / "vision")
    facts = describe(str(folder))
    size = count(load_file(folder / "model.safetensors"))
    assert (facts["parameters"], facts["parts"]) == (size, {"vision": size})
    assert facts["uses"] == ["import as --vision"]
    assert "activated" not in facts


def test_inspect_of_a_projector_file(tmp_path):
    state = {"model.mm_projector.0.weight": torch.zeros(4, 3).half()}
    torch.save(state, tmp_path / "mm_projector.bin")
    assert describe(str(tmp_path / "mm_projector.bin")) == {
        "kind": "projector",
        "tensors": 1,
        "dtypes": {"float16": 12},
        "parameters": 12,
        "parts": {"projector": 12},
        "uses": ["import as --projector"],
    }


@pytest.fixture
def llava(tmp_path, small_tokenizer):
    model = hf.llava(hf.Text(num_layers=1).config(), hf.clip_config(), small_tokenizer.image_id)
    return hf.save(model, tmp_path / "hf", small_tokenizer)


def test_inspect_of_a_complete_model_and_of_one_without_a_tensor(llava):
    facts = describe(str(llava))
    file = llava / "model.safetensors"
    state = load_file(file)
    assert facts["parameters"] == sum(facts["parts"].values()) == count(state)
    assert facts["uses"] == ["import", "train", "generate", "evaluate"]
    del state["language_model.model.norm.weight"]
    save_file(state, file)
    facts = describe(str(llava))
    assert facts["uses"] == []
    assert facts["not imported"][1:] == ["  missing language_model.model.norm.weight (32,)"]


def test_inspect_of_a_checkpoint_of_llavas_code_without_tower(llava, small_tokenizer, tmp_path):
    state = {
        name.replace("language_model.model.", "model."): torch.from_numpy(x)
        for name, x in load_file(llava / "model.safetensors").items()
        if name.startswith("language_model.")
    }
    text = json.loads((llava / "config.json").read_text())["text_config"]
    fields = text | {"model_type": "llava_qwen2", "mm_projector_type": "mlp2x_gelu"}
    for i, width in ((0, 24), (2, 32)):
        state[f"model.mm_projector.{i}.weight"] = torch.zeros(32, width)
        state[f"model.mm_projector.{i}.bias"] = torch.zeros(32)
    folder = hf.save_original(state, fields, tmp_path / "original", small_tokenizer)
    facts = describe(str(folder))
    assert facts["uses"] == ["import with --vision"]
    assert facts["parts"]["projector"] == 32 * (24 + 1 + 32 + 1)
    assert facts["parameters"] == sum(facts["parts"].values()) == count(state)
