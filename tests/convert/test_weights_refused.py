"""Weights that no model can be computed with: non-finite or quantized."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from moddistill.config import ExpertConfig
from moddistill.convert.exporting import export_model
from moddistill.convert.importing import import_model
from moddistill.convert.upcycling import upcycle_model
from moddistill.convert_weights import main
from moddistill.data.tokenizer import load_tokenizer
from moddistill.storage.model_folder import load_params, save_model
from tests.convert import hf_folders as hf
from tests.convert.hf_folders import change_config, change_weights


@pytest.fixture
def language(tmp_path, small_tokenizer):
    return hf.save(hf.Text(num_layers=2).model(), tmp_path / "hf", small_tokenizer)


def test_nonfinite_weights_are_listed_and_refused(language, tmp_path):
    def poison(state):
        state["model.norm.weight"][0] = float("nan")
        state["model.layers.1.mlp.up_proj.weight"][3, 4:6] = float("-inf")
        return state

    change_weights(language, poison)
    with pytest.raises(
        ValueError, match="expected finite weights, got non-finite numbers in 2 tensors"
    ) as error:
        import_model(str(language), tmp_path / "model")
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == {
        "model.norm.weight: 1 NaN",
        "model.layers.1.mlp.up_proj.weight: 2 infinite",
    }
    assert not (tmp_path / "model").exists()


def test_nonfinite_pooling_head_is_refused(language, tmp_path):
    vision = hf.save(hf.siglip_tower(vision_use_head=True), tmp_path / "vision")

    def poison(state):
        state["head.probe"][0, 0, 0] = float("inf")
        return state

    change_weights(vision, poison)
    with pytest.raises(ValueError, match=r"head\.probe: 1 infinite"):
        import_model(str(language), tmp_path / "model", vision=str(vision))


def test_quantized_pooling_head_is_refused(language, tmp_path):
    vision = hf.save(hf.siglip_tower(vision_use_head=True), tmp_path / "vision")

    def quantise(state):
        return state | {"head.probe": state["head.probe"].astype(ml_dtypes.float8_e4m3fn)}

    change_weights(vision, quantise)
    with pytest.raises(
        ValueError, match=r"expected .*bfloat16 .*, got head\.probe in float8_e4m3fn"
    ):
        import_model(str(language), tmp_path / "model", vision=str(vision))


def test_float64_weights_are_refused(language, tmp_path):
    """Numbers beyond the range of float32 would become infinite on loading."""
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(language, lambda state: state | {name: state[name].astype(np.float64)})
    with pytest.raises(
        ValueError, match=rf"expected float32, bfloat16 or fl.*, got {name} in float64"
    ):
        import_model(str(language), tmp_path / "model")


@pytest.mark.parametrize("use", ["export", "upcycle"])
def test_nonfinite_parameters_of_a_model_folder_are_refused(language, tmp_path, use):
    """As after a diverged stage."""
    config = import_model(str(language), tmp_path / "model")
    params = load_params(tmp_path / "model", config)
    kernel = params["decoder"]["segment_0"]["block_0"]["mlp"]["up"]["kernel"]
    params["decoder"]["segment_0"]["block_0"]["mlp"]["up"]["kernel"] = kernel.at[1, 0, 0].set(
        float("nan")
    )
    save_model(tmp_path / "bad", config, params, load_tokenizer(str(language)), {})
    with pytest.raises(ValueError, match=r"layers.1.mlp.up.*: 1 NaN"):
        if use == "export":
            export_model(tmp_path / "bad", tmp_path / "out", max_shard_size=10**9)
        else:
            upcycle_model(tmp_path / "bad", tmp_path / "out", ExpertConfig())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("quantization", "shown"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"load_in_8bit": True}, r"\{'load_in_8bit': True\}"),
    ],
)
def test_quantized_release_is_refused_by_its_config(language, tmp_path, quantization, shown):
    change_config(language, quantization_config=quantization)
    message = rf"config\.json: quantization_config: expected .* the bfloat16 release, got {shown}"
    with pytest.raises(ValueError, match=message):
        import_model(str(language), tmp_path / "out")


def test_quantized_weights_without_a_config_entry_are_refused(language, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"

    def quantise(state):
        scale = np.ones((1, 1), np.float32)
        narrow = state[name].astype(ml_dtypes.float8_e4m3fn)
        return state | {name: narrow, f"{name}_scale_inv": scale}

    change_weights(language, quantise)
    with pytest.raises(
        ValueError, match=rf"expected .*bfloat16 release, got {name} in float8_e4m3fn"
    ):
        import_model(str(language), tmp_path / "out")


@pytest.mark.parametrize(
    ("dtype", "number", "message"),
    [
        (
            "float16",
            1e30,
            "expected numbers within the range of float16, got 1e+30; it fits bfloat16 or float32",
        ),
        (
            "bfloat16",
            3.4e38,
            "expected numbers within the range of bfloat16, got 3.4e+38; it fits float32",
        ),
    ],
)
def test_overflow_of_the_export_dtype_names_the_tensor(
    dtype, number, message, tmp_path, tiny_architecture, init, small_tokenizer
):
    config = dataclasses.replace(tiny_architecture(), vision=None)
    params = init(config)
    params["decoder"]["norm"]["scale"] = params["decoder"]["norm"]["scale"].at[0].set(-number)
    save_model(tmp_path / "model", config, params, small_tokenizer, {})
    with pytest.raises(ValueError) as error:
        export_model(tmp_path / "model", tmp_path / "out", max_shard_size=10**9, dtype=dtype)
    assert str(error.value) == f"{tmp_path / 'model'}: model.norm.weight: {message}"
    assert not (tmp_path / "out").exists()


def test_placement_of_a_layer_with_thousands_of_digits_is_one_line(language, tmp_path):
    args = ["--model", str(language), "--out", str(tmp_path / "out")]
    message = r"^error: --placement: expected one of 'sparse', .*, got '9999"
    with pytest.raises(SystemExit, match=message):
        main(["upcycle", *args, "--placement", "9" * 5000])
