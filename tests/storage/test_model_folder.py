import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moddistill
from moddistill.config import ExpertConfig
from moddistill.data.tokenizer import Tokenizer, load_tokenizer
from moddistill.models.flops import parameter_counts
from moddistill.models.vlm import Vlm
from moddistill.params import flatten, unflatten
from moddistill.storage.model_folder import load_params, read_model_config, save_model


@pytest.fixture(scope="module")
def sparse(tiny_architecture, init):
    """A sparse architecture and parameters of two dtypes."""
    config = tiny_architecture("tiny", ExpertConfig(placement=(0, 3)))
    params = init(config)
    params["vision"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["vision"])
    return config, params


@pytest.fixture(scope="module")
def folder(sparse, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("folder") / "model"
    save_model(path, *sparse, tokenizer, {"stage": "d2s"})
    return path


def test_round_trip_keeps_bits_and_dtypes(folder, sparse):
    config, params = sparse
    assert read_model_config(folder) == config
    loaded = load_params(folder, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda x: x.dtype, loaded) == jax.tree.map(lambda x: x.dtype, params)


def test_load_returns_parameters_in_float32(folder, sparse):
    model, params = moddistill.load(folder)
    assert model == Vlm(sparse[0])
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_folder_has_layer_plan_source_tokenizer_and_image_settings(folder, tokenizer):
    description = json.loads((folder / "model.json").read_text())
    assert description["layer_plan"] == [
        {"pattern": [True], "repeats": 1},
        {"pattern": [False], "repeats": 2},
        {"pattern": [True], "repeats": 1},
    ]
    assert description["source"] == {"stage": "d2s"}
    assert load_tokenizer(str(folder)).backend.get_vocab() == tokenizer.backend.get_vocab()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 28}


def test_image_settings_are_those_of_the_vision_encoder(sparse, tokenizer, tmp_path):
    config, params = sparse
    tower = dataclasses.replace(config.vision, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    config = dataclasses.replace(config, vision=tower)
    save_model(tmp_path / "model", config, params, tokenizer, {})
    settings = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.1, 0.2, 0.3]
    assert settings["image_std"] == [0.4, 0.5, 0.6]
    assert read_model_config(tmp_path / "model") == config


def test_one_component_can_be_loaded(folder, sparse):
    loaded = load_params(folder, sparse[0], part="projector")
    assert list(loaded) == ["projector"]
    jax.tree.map(np.testing.assert_array_equal, loaded["projector"], sparse[1]["projector"])


def test_interrupted_write_leaves_no_folder(sparse, tokenizer, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save_model(tmp_path / "model", *sparse, tokenizer, {})
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    save_model(tmp_path / "model", *sparse, tokenizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_folder_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^expected a model folder, .* got .* without model\.json$"
    ):
        moddistill.load(tmp_path)


def test_folder_of_another_version_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    with pytest.raises(ValueError, match=r"model\.json: version: expected 3, got 99"):
        moddistill.load(tmp_path / "model")


def test_all_mismatched_parameters_are_named_at_once(sparse, tokenizer, tmp_path):
    config, params = sparse
    flat = flatten(params)
    del flat["decoder/norm/scale"]
    flat["decoder/extra"] = jnp.zeros(3)
    flat["projector/linear_0/bias"] = jnp.zeros(5)
    save_model(tmp_path / "model", config, unflatten(flat), tokenizer, {})
    with pytest.raises(ValueError) as error:
        moddistill.load(tmp_path / "model")
    assert str(error.value).splitlines()[1:] == [
        "  missing decoder/norm/scale (16,)",
        "  unexpected decoder/extra (3,)",
        "  projector/linear_0/bias has shape (5,), expected (16,)",
    ]


def test_parameter_counts_are_those_worked_by_hand(tiny_architecture):
    """Width 16, feed-forward 32, 4 layers with 4 heads and 2 for keys and values, 320 rows."""
    norm, expert = 16, 3 * 16 * 32
    attention = 2 * 16 * 16 + 2 * 16 * 8 + 16 + 2 * 8
    decoder = 320 * 16 + 4 * (attention + expert + 2 * norm) + norm
    # 2 x 2 patches of 14 x 14 x 3 and a layer; the final norm is never computed.
    block = 4 * (16 * 16 + 16) + 16 * 32 + 32 + 32 * 16 + 16 + 4 * 16
    vision = 14 * 14 * 3 * 16 + 16 + 5 * 16 + 2 * 16 + block
    projector = 2 * (16 * 16 + 16)
    dense = decoder + vision + projector
    assert parameter_counts(tiny_architecture()) == (dense + 2 * 16, dense)
    # Two more layers above the selected one.
    config = tiny_architecture()
    tower = dataclasses.replace(config.vision, num_layers=3, select_layer=-3)
    total = dense + 2 * block + 2 * 16
    assert parameter_counts(dataclasses.replace(config, vision=tower)) == (total, dense)
    # Layers 0 and 2 have four experts and a router of 16 x 4; a token uses two experts.
    sparse = dense + 2 * (3 * expert + 16 * 4)
    assert parameter_counts(tiny_architecture("tiny", ExpertConfig())) == (
        sparse + 2 * 16,
        sparse - 2 * 2 * expert,
    )
