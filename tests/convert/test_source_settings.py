"""Generation and image settings of a source that an export preserves or replaces."""

import json
import logging

import pytest
import transformers
from transformers import AutoProcessor, GenerationConfig

from moddistill.config import ExpertConfig
from moddistill.convert.describe import describe
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.resolve import load
from moddistill.convert.upcycling import upcycle_model
from moddistill.storage.model_folder import preprocessor_config, save_model
from tests.convert import hf_folders as hf

GB = 10**9
# As published with Qwen2-Instruct, ids apart.
SAMPLING = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "repetition_penalty": 1.05,
    "max_new_tokens": 77,
}
# As published with llava-hf/llava-1.5-7b-hf, size and colours apart.
CROP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_center_crop": True,
    "crop_size": {"height": 12, "width": 12},
    "do_resize": True,
    "size": {"shortest_edge": 12},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.2, 0.2],
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory, small_tokenizer):
    """Returns a function for a LLaVA folder with settings in JSON files."""
    model = hf.multimodal("CLIP and Qwen2", small_tokenizer.image_id)

    def make(**files):
        folder = hf.save(model, tmp_path_factory.mktemp("hf"), small_tokenizer)
        (folder / "generation_config.json").unlink()
        for name, fields in files.items():
            (folder / f"{name}.json").write_text(json.dumps(fields))
        return folder

    return make


def exported(model, out):
    export_model(model, out, max_shard_size=GB)
    return json.loads((out / "generation_config.json").read_text())


def processor_in(folder):
    return json.loads((folder / "preprocessor_config.json").read_text())


def warnings_of(caplog):
    found = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
    caplog.clear()
    return found


@pytest.mark.slow
def test_sampling_settings_are_exported_until_a_stage_trains(
    llava, tmp_path, small_tokenizer, caplog
):
    caplog.set_level(logging.INFO, "moddistill")
    settings = {**SAMPLING, "transformers_version": "4.41.2", "_from_model_config": True}
    config = import_model(str(llava(generation_config=settings)), tmp_path / "model")
    assert "do_sample True, temperature 0.7, top_p 0.8, top_k 20" in caplog.text
    assert "a trained model is exported with greedy decoding" in caplog.text
    upcycle_model(tmp_path / "model", tmp_path / "sparse", ExpertConfig())
    found = exported(tmp_path / "model", tmp_path / "out")
    assert found == exported(tmp_path / "sparse", tmp_path / "sparse-out")
    assert {name: found[name] for name in SAMPLING} == SAMPLING
    assert found["suppress_tokens"] == [small_tokenizer.image_id]
    assert "_from_model_config" not in found
    loaded = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (loaded.temperature, loaded.do_sample) == (0.7, True)
    save_model(tmp_path / "trained", config, load(tmp_path / "model")[1], small_tokenizer, {})
    found = exported(tmp_path / "trained", tmp_path / "trained-out")
    assert found["do_sample"] is False
    assert not found.keys() & (SAMPLING.keys() - {"do_sample"})


def test_eos_ids_are_exported_if_they_include_those_of_the_template(
    llava, tmp_path, small_tokenizer, caplog
):
    image = small_tokenizer.image_id
    rows = f"vocabulary 320 -> {image + 1} rows, head row {image} -> mean of the tokens' rows"
    general, im_end = (small_tokenizer.special(x) for x in ("<|endoftext|>", "<|im_end|>"))
    ends = {"eos_token_id": [im_end, general], "pad_token_id": general}
    import_model(str(llava(generation_config=ends)), tmp_path / "both")
    caplog.set_level(logging.INFO, "moddistill")
    found = exported(tmp_path / "both", tmp_path / "both-out")
    assert {name: found[name] for name in ends} == ends
    assert caplog.messages[-1] == f"changed against {tmp_path / 'both'}: {rows}"
    ends = {"eos_token_id": general, "pad_token_id": 0}
    import_model(str(llava(generation_config=ends)), tmp_path / "other")
    found = exported(tmp_path / "other", tmp_path / "other-out")
    assert (found["eos_token_id"], found["pad_token_id"]) == (im_end, general)
    assert caplog.messages[-1] == (
        f"changed against {tmp_path / 'other'}: {rows}, "
        f"eos_token_id {general} -> {im_end}, pad_token_id 0 -> {general}"
    )


def test_image_processor_of_the_source_is_exported_until_a_stage_trains(
    llava, tmp_path, small_tokenizer, caplog
):
    source = llava(preprocessor_config=CROP)
    config = import_model(str(source), tmp_path / "model")
    changes = (
        "image_processor_type 'CLIPImageProcessor' -> 'LlavaImageProcessor', do_pad None -> True"
    )
    assert warnings_of(caplog) == [
        f"{source}: images are padded to squares and resized to 12 x 12 pixels here; its own image "
        "processor, which comes back from an export until a stage trains the model, differs in "
        f"{changes}"
    ]
    assert describe(str(tmp_path / "model"))["imported"]["replaced"] == changes.split(", ")
    exported(tmp_path / "model", tmp_path / "out")
    assert processor_in(tmp_path / "out") == CROP
    assert type(AutoProcessor.from_pretrained(tmp_path / "out").image_processor).__name__ in (
        "CLIPImageProcessor",
        "CLIPImageProcessorPil",
    )
    save_model(tmp_path / "trained", config, load(tmp_path / "model")[1], small_tokenizer, {})
    exported(tmp_path / "trained", tmp_path / "trained-out")
    assert processor_in(tmp_path / "trained-out") == preprocessor_config(
        12, tuple(CROP["image_mean"]), tuple(CROP["image_std"])
    )


def test_image_processor_that_is_no_valid_json_is_refused(llava, tmp_path):
    source = llava(preprocessor_config=CROP | {"rescale_factor": float("inf")})
    with pytest.raises(ValueError, match=r"image processor: rescale_factor: expected finite numb"):
        import_model(str(source), tmp_path / "model")


@pytest.mark.parametrize(
    ("field", "value", "change"),
    [
        ("resample", 2, "resample 2 -> 3"),
        ("size", {"shortest_edge": 24}, "size {'shortest_edge': 24} -> {'shortest_edge': 12}"),
        ("do_normalize", False, "do_normalize False -> True"),
        ("rescale_factor", 1.0, f"rescale_factor 1.0 -> {1 / 255}"),
    ],
)
def test_each_image_setting_that_differs_is_reported(field, value, change, llava, tmp_path, caplog):
    fields = {**CROP, "image_processor_type": "LlavaImageProcessor", "do_pad": True, field: value}
    import_model(str(llava(preprocessor_config=fields)), tmp_path / "model")
    [warning] = warnings_of(caplog)
    assert warning.endswith(f"differs in {change}")


def test_image_processor_without_mean_and_std_is_reported(llava, tmp_path, caplog):
    fields = {name: value for name, value in CROP.items() if not name.startswith("image_")}
    import_model(str(llava(preprocessor_config=fields)), tmp_path / "model")
    [warning] = warnings_of(caplog)
    assert "do_pad None -> True, image_mean None -> [0.48145466," in warning


def test_export_resaved_by_transformers_has_the_same_image_processor(
    llava, tmp_path, small_tokenizer, caplog
):
    config = import_model(str(llava(preprocessor_config=CROP)), tmp_path / "model")
    save_model(tmp_path / "trained", config, load(tmp_path / "model")[1], small_tokenizer, {})
    exported(tmp_path / "trained", tmp_path / "out")
    caplog.clear()
    again = llava()
    AutoProcessor.from_pretrained(tmp_path / "out").save_pretrained(again)
    assert import_model(str(again), tmp_path / "again").vision.mean == (0.5, 0.4, 0.3)
    assert warnings_of(caplog) == []


def test_invalid_generation_config_is_refused_before_writing(llava, tmp_path):
    source = llava()
    (source / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json: expected JSON"):
        import_model(str(source), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_transformers_version_equals_that_of_save_pretrained(llava, tmp_path):
    """Without a version from 5 on, releases 4.57.3 and later warn of a wrong tokenizer."""
    import_model(str(llava()), tmp_path / "model")
    found = exported(tmp_path / "model", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers_version"] == found["transformers_version"]
    assert config["transformers_version"] == transformers.__version__ >= "5"
