"""Exports have the names of published checkpoints, for all prefixes of the source."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoModelForImageTextToText

from moddistill.config import ExpertConfig
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.resolve import load
from moddistill.convert.upcycling import upcycle_model
from moddistill.storage.model_folder import save_model
from moddistill.storage.shards import open_checkpoint
from tests.convert import hf_folders as hf
from tests.convert.published_names import published_name, published_names, vllm_name

GB = 10**9

# A tensor of each part, by the release that saves it.
SAVED = {
    "transformers 4": (
        "language_model.model.",
        "language_model.",
        "vision_tower.vision_model.",
        "multi_modal_projector.",
    ),
    "transformers 5": (
        "language_model.model.",
        "language_model.",
        "vision_tower.",
        "multi_modal_projector.",
    ),
    "a state dict of transformers 4.52": (
        "model.language_model.",
        "",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
    ),
    "a state dict of transformers 5": (
        "model.language_model.",
        "",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
}
MODELS = (
    "CLIP and Qwen2, untied",
    "SigLIP with its pooling head and Qwen2",
    "SigLIP and Qwen3, untied",
)


def tensors(folder):
    return {name: np.array(tensor.read()) for name, tensor in open_checkpoint(folder).items()}


def saved_name(name, release):
    """A published name as the release saves it."""
    for published, prefix in zip(SAVED["transformers 4"], SAVED[release], strict=True):
        if name.startswith(published):
            return prefix + name.removeprefix(published)
    return name


@pytest.fixture
def source(tmp_path, small_tokenizer):
    """`source(name, release)`: the folder of a LLaVA with the names of a release."""

    def make(name, release):
        model = hf.multimodal(name, small_tokenizer.image_id)
        folder = hf.save(model, tmp_path / "hf", small_tokenizer)
        state = {published_name(name): x for name, x in tensors(folder).items()}
        save_file(
            {saved_name(name, release): x for name, x in state.items()},
            folder / "model.safetensors",
        )
        return folder, state

    return make


def assert_published(folder):
    """The names of a published checkpoint, which vLLM and `transformers` load completely."""
    config = json.loads((folder / "config.json").read_text())
    names = set(open_checkpoint(folder))
    assert names == published_names(config)
    assert {vllm_name(name) for name in names} == names
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize("release", SAVED)
@pytest.mark.parametrize("name", MODELS)
def test_export_of_an_untrained_import_has_published_names(name, release, source, tmp_path):
    folder, state = source(name, release)
    import_model(str(folder), tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "out", max_shard_size=GB, vocabulary="padded")
    assert_published(tmp_path / "out")
    exported = tensors(tmp_path / "out")
    assert exported.keys() == state.keys()
    for key, expected in state.items():
        assert exported[key].dtype == expected.dtype, key
        assert exported[key].tobytes() == expected.tobytes(), key


@pytest.mark.slow
@pytest.mark.parametrize("release", ["transformers 4", "transformers 5"])
@pytest.mark.parametrize("moe", [None, ExpertConfig()], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_export_of_a_trained_model_has_published_names(
    name, moe, release, source, tmp_path, small_tokenizer
):
    folder, _ = source(name, release)
    config = import_model(str(folder), tmp_path / "model")
    if moe is not None:
        config = upcycle_model(tmp_path / "model", tmp_path / "sparse", moe)
    params = load(tmp_path / ("sparse" if moe else "model"))[1]
    save_model(tmp_path / "trained", config, params, small_tokenizer, {})
    export_model(tmp_path / "trained", tmp_path / "out", max_shard_size=GB)
    assert_published(tmp_path / "out")


def test_transformers_saves_tensors_with_the_assumed_names(tmp_path, small_tokenizer):
    """The installed release; the names of releases before 5 are those it loads as published."""
    model = hf.multimodal("CLIP and Qwen2, untied", small_tokenizer.image_id)
    folder = hf.save(model, tmp_path / "hf", small_tokenizer)
    names = set(open_checkpoint(folder))
    assert {saved_name(published_name(name), "transformers 5") for name in names} == names
