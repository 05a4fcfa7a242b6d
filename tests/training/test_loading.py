import dataclasses

import jax
import numpy as np
import pytest

from moddistill.config import ExpertConfig, MeshConfig
from moddistill.convert.resolve import load, resolve
from moddistill.data.tokenizer import train_bpe
from moddistill.distributed.sharding import make_mesh
from moddistill.params import flatten
from moddistill.storage.model_folder import save_model
from moddistill.training import loading
from moddistill.training.architectures import resolve_models


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


def random_words():
    letters = np.random.default_rng(0).integers(ord("a"), ord("z"), (300, 5))
    return [" ".join("".join(map(chr, word)) for word in letters)] * 2


@pytest.fixture
def start(mesh):
    """`start(config)`: what a stage trains, before the first step."""

    def make(config):
        models = resolve_models(config)
        return models.student_config, loading.student_params(config, models, mesh)

    return make


def test_new_weights_are_those_of_the_seed(start, tiny_config):
    seeds = (0, 0, 1)
    weights = [
        flatten(start(tiny_config("sft", seed=seed))[1])["decoder/embedding"] for seed in seeds
    ]
    np.testing.assert_array_equal(weights[0], weights[1])
    assert np.any(weights[0] != weights[2])


def test_student_of_a_folder_keeps_its_weights(start, tiny_config, tiny_models):
    config = tiny_config("sft", student=str(tiny_models["dense"]), tokenizer="")
    _, params = start(config)
    jax.tree.map(np.testing.assert_array_equal, params, load(tiny_models["dense"])[1])


def test_dense_to_sparse_copies_the_feed_forward_layers(start, tiny_config, tiny_models):
    config = tiny_config("d2s", student=str(tiny_models["dense"]), tokenizer="")
    target, params = start(config)
    assert target.decoder.moe == ExpertConfig(norm_topk_prob=True)
    sparse, dense = flatten(params), flatten(load(tiny_models["dense"])[1])
    for i, layer in enumerate(target.decoder.moe_layers):
        gate = dense["decoder/segment_0/block_0/mlp/gate/kernel"][layer]
        for expert in range(4):
            copy = sparse["decoder/segment_0/block_0/moe/experts_gate"][i, expert]
            np.testing.assert_array_equal(copy, gate)


def test_text_only_student_gets_a_vision_encoder_and_a_new_projector(
    start, tiny_config, tiny_architecture, tiny_models, tokenizer, init, tmp_path
):
    config = dataclasses.replace(tiny_architecture(), vision=None)
    save_model(tmp_path / "text", config, init(config), tokenizer, {})
    tower = str(tiny_models["teacher"])
    stage = tiny_config("init", student=str(tmp_path / "text"), vision=tower, tokenizer="")
    target, params = start(stage)
    assert target.vision == tiny_architecture("tiny-teacher").vision
    jax.tree.map(np.testing.assert_array_equal, params["vision"], load(tower)[1]["vision"])
    assert params["projector"]["linear_1"]["kernel"].shape == (16, 16)
    decoder = load(tmp_path / "text")[1]["decoder"]
    jax.tree.map(np.testing.assert_array_equal, params["decoder"], decoder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tokenizer": ""},
            r"config\.tokenizer: expected a tokenizer folder, .*'random:tiny', got ''$",
        ),
        (
            {"student": "DENSE"},
            r"config\.tokenizer: expected '', since the student .* has its own, got '",
        ),
        (
            {"student": "nowhere", "tokenizer": ""},
            r"^config\.student: expected a model folder, .* got 'nowhere'",
        ),
        (
            {"student": "random:tinny"},
            r"^config\.student: preset: .*, got 'tinny' .*did you mean 'tiny'",
        ),
        ({"vision": "DENSE"}, r"config\.vision: expected '', since .*:tiny' has a vision encoder"),
        (
            {"student": "SPARSE", "tokenizer": ""},
            r"^config\.student: expected a dense .*, got one with 4 experts in layers \(0, 2\)",
        ),
        (
            {"moe": {"top_k": 5}},
            r"^config\.moe\.top_k: expected 1 to moe\.num_experts \(4\), got 5",
        ),
    ],
)
def test_student_that_does_not_fit_is_refused(tiny_config, tiny_models, fields, message):
    folders = {"DENSE": str(tiny_models["dense"]), "SPARSE": str(tiny_models["sparse"])}
    fields = {k: folders.get(v, v) if isinstance(v, str) else v for k, v in fields.items()}
    config = tiny_config("d2s", **fields)
    with pytest.raises(ValueError, match=message):
        resolve_models(config)


def test_tokenizer_with_more_ids_than_rows_is_refused(tiny_config):
    tokenizer = train_bpe(random_words(), 400)
    with pytest.raises(ValueError, match=r"tokenizer: expected at most 320 ids, .*, got 400"):
        resolve("random:tiny", tokenizer)
